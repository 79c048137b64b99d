"""Wrapped models in the evaluation tools of others."""
