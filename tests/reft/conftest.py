"""Fixtures of the model wrapper's tests: those of word_llama.py."""

from word_llama import *  # noqa: F403
