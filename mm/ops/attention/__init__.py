"""Attention, whole and by blocks of keys: what the device has fused, and what it is made of."""
