"""Sinks of what is measured: one file each, listed in `mm.train.sinks.make`."""
