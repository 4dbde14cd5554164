"""The training run: loop, step, checkpoints of its state, metrics."""
