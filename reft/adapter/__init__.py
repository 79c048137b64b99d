"""Adapters: parameters, edit weights, host memory, device cache; torch only, no transformers."""
