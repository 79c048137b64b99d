"""What an adapter is and where its numbers live: torch only, no transformers."""
