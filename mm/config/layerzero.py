"""zero_config.yaml: how layer-zero (`--layerzero`) shards parameters, with MindSpeed-MM's names.

Every key of MindSpeed-MM's file is known. A value that could not be followed here is refused with what to do instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from mm.config.base import Section, parse
from mm.config.mesh import MeshFlags
from mm.config.yaml_file import load_yaml
from mm.errors import ConfigError, Problem, raise_all

BLOCK_CLASSES = ("WanDiTBlock", "WanBlock")
# Never on the training device, so there is nothing to leave out: MindSpeed-MM's own files name them.
ABSENT_MODULES = ("ae", "text_encoder")
TOP_MODULES = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "head")


class ZeroConfig(Section):
    """The file of `--layerzero-config`.

    Attributes:
        zero3_size: ranks among which every parameter is sharded; the groups of that size hold copies. It must divide
            the data- times the context-parallel size: MindSpeed takes the smaller of the two in silence, and here a
            size that does not fit is an error.
        transformer_layers: the class that is gathered as one unit, by dotted path; there is one, the block.
        forward_prefetch: gather the next unit's parameters while this one computes.
        param_dtype: of the gathered parameters; must agree with `--bf16`. reduce_dtype: of the gradients' reduction.
        ignored_modules: top-level modules of the transformer that are not sharded.
    """

    zero3_size: int = Field(8, ge=1)
    transformer_layers: list[str] | None = Field(None, min_length=1)
    forward_prefetch: bool = True
    param_dtype: Literal["bf16", "fp32"] | None = None
    reduce_dtype: Literal["bf16", "fp32"] = "fp32"
    ignored_modules: list[str] | None = None

    backward_prefetch: Literal["BACKWARD_PRE"] = "BACKWARD_PRE"
    backward_reduce_scatter: Literal["BACKWARD_PRE"] = "BACKWARD_PRE"
    buffer_dtype: None = None
    limit_all_gathers: Literal[True] = True
    offload_grads: Literal[False] = False
    ckpt_load_path: None = None
    autocast_input: Literal[True] = True
    autocast_output: Literal[True] = True

    @field_validator("transformer_layers")
    @classmethod
    def _are_blocks(cls, paths: list[str] | None) -> list[str] | None:
        for path in paths or ():
            if path.rpartition(".")[2] not in BLOCK_CLASSES:
                raise ValueError(
                    f'"{path}" is no class of this model; the block is called {" or ".join(BLOCK_CLASSES)}'
                )
        return paths

    @field_validator("ignored_modules")
    @classmethod
    def _are_modules(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in ABSENT_MODULES + TOP_MODULES:
                raise ValueError(
                    f'"{name}" cannot be left out; what can be is {", ".join(ABSENT_MODULES + TOP_MODULES)}'
                )
        return names


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
