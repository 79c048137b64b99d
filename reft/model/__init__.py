"""The wrapper around a Hugging Face model: where it is edited, when, and what is stored."""
