"""Callbacks around a step: one file each, listed in `mm.train.callbacks.make`."""
