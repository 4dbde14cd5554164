"""VideoX-Fun's training command lines: its scripts' flags, its files, and what `accelerate` hands to a process."""
