"""What ranks, readers and commands import, for the server that they are forked from."""

from mm.cli.imports import large_imports

with large_imports():
    pass
