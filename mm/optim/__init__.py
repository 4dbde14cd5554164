"""Optimizers on a parallel model: gradients made whole, the update, averages, and what each rank owns."""

from mm.device.megatron_import import import_megatron

import_megatron()
