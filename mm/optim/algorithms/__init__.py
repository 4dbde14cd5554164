"""Optimizers, one file each with what it keeps and how it updates; listed in `mm.optim.algorithms.make`."""
