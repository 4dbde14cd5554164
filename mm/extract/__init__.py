"""The feature-extraction stage."""
