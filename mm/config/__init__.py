"""Typed, closed configuration, checked before any device is touched. Imports no torch."""
