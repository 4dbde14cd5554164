"""The embedded default: a tiny Wan2.1 in the HF folder layout and a small captioned data set, made by one command."""
