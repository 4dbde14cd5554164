"""Residency of frozen weights: what stays on the device, what waits in host memory, what is read from files again."""
