"""What a run is, in sections that no command line knows: the inner configuration that everything else reads."""
