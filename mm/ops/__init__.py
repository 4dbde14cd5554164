"""Operators that the model computes with, by kind of device."""
