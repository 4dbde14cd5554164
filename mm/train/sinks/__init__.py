"""Where what is measured goes: one file each, listed in `mm.train.sinks.make`."""
