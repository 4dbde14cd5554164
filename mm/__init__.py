"""Parallel training of Wan2.1 video diffusion transformers. Importing this package alone imports no torch."""

__version__ = "0.1.0"
