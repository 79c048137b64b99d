"""Files of adapters: reading what strangers wrote, writing whole or not at all."""
