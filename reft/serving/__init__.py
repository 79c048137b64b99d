"""Serving engines that edit with adapters."""
