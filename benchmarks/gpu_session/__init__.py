"""A session on a GPU: its stages, what they need, and what it leaves behind."""
