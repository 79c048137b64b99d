"""Adapters of the libraries pyreft and adapters: reading both, writing pyreft's."""
