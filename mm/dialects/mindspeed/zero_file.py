"""zero_config.yaml, the file of `--layerzero-config`.

Every key of MindSpeed-MM's file is known. A value that could not be followed here is refused with what to do instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm.config.base import parse
from mm.config.layerzero import ZeroConfig
from mm.config.yaml_file import load_yaml
from mm.dialects.mindspeed.mesh_flags import MeshFlags
from mm.errors import ConfigError, Problem, raise_all

# Keys with one value that can be followed, and what someone does who wanted another.
_ONLY: dict[str, tuple[Any, str]] = {
    "backward_prefetch": ("BACKWARD_PRE", "Remove it; the next unit is always gathered before this one's gradients."),
    "backward_reduce_scatter": ("BACKWARD_PRE", "Remove it; gradients are always reduced as soon as they are there."),
    "buffer_dtype": (None, "Remove it; the transformer has no buffers."),
    "limit_all_gathers": (True, "Remove it; gathers are always limited to the units in use and the next one."),
    "offload_grads": (False, "Remove it; to save memory raise zero3_size or the tensor-parallel degree."),
    "ckpt_load_path": (None, "Remove it; give the folder of checkpoints with --load or --save."),
    "autocast_input": (True, "Remove it; where precision changes is part of the model."),
    "autocast_output": (True, "Remove it; where precision changes is part of the model."),
}


def load_zero(flags: MeshFlags) -> ZeroConfig | None:
    """Read the file of `--layerzero-config`; None without layer-zero.

    One of the two flags without the other is left to the rule about it (CFG-045).

    Raises:
        ConfigError: CFG-001 and CFG-002 when the file cannot be read, CFG-003, CFG-005 and CFG-008 for what it holds.
    """
    if not flags.layerzero or flags.layerzero_config is None:
        return None
    path = Path(flags.layerzero_config)
    values = load_yaml(path)
    problems = list(_take_refused(values, str(path)))
    try:
        zero = parse(ZeroConfig, values, str(path))
    except ConfigError as error:
        problems += error.problems
    raise_all(ConfigError, problems)
    return zero


def _take_refused(values: Any, source: str) -> Iterator[Problem]:
    """Report (CFG-008) and remove values that could not be followed, so that they are not of a wrong kind as well."""
    for name, (only, remedy) in _ONLY.items():
        if isinstance(values, dict) and name in values and values[name] != only:
            value = values.pop(name)
            yield Problem("CFG-008", f'{source}: "{name}" is {json.dumps(value)}, which has no effect here.', remedy)
