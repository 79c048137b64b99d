"""Scores of finetuning methods after equal numbers of optimizer steps."""
