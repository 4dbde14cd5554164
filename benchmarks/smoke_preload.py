"""Imported once by the server that the steps of a smoke run are forked from. It must leave the device alone."""

import mm.extract.run
import mm.generate.run
import mm.train.loop  # noqa: F401
