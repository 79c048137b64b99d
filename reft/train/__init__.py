"""Training and evaluation: data files, data collator, trainers, checkpoints, generation."""
