"""The Wan model family on one device. Nothing here knows of processes or ranks."""
