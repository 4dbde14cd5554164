"""Tasks: one declaration a file, and the registry."""
