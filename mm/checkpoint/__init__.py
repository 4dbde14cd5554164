"""The training checkpoint store, reading weights of any known format, and conversion between the formats."""
