"""Training and evaluation: data files, batches, a Trainer, exact match."""
