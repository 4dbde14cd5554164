"""Process groups, the mesh, and what puts a single-device model on many devices."""
