"""Adapters of pyreft and of adapters: read into this library's form, and pyreft's written."""
