"""Adapter files: safe reading of untrusted files, atomic writing."""
