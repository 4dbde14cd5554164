"""Sections of a run, which no command line knows: the inner configuration that everything else reads."""
