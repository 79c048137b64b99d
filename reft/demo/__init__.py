"""``reft demo``: two small tasks from beginning to end on shipped data, without the network.

``causal`` and ``encoder`` are the two; ``measure``, ``plot``, ``reload`` and ``report`` are what
both are made of.
"""
