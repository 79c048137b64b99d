"""``reft demo``: two small tasks on shipped data, offline: ``causal`` and ``encoder``."""
