"""What each task is made of: one declaration a file, and the registry."""
