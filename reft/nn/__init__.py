"""Trained parameters of an adapter and how they start. PyTorch only, no transformers."""
