"""Shape rules at work: the size and the frames of each sample, as pure functions."""
