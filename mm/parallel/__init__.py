"""Process groups, the mesh, and what puts a single-device model on many devices."""

from mm.device.megatron_import import import_megatron

import_megatron()
