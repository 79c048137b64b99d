"""Wrapped models in evaluation tools: lm-evaluation-harness."""
