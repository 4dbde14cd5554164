"""Sharding of parameters by layer-zero, with the names that FSDP and MindSpeed-MM have for it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mm.config.base import Section

BLOCK_CLASSES = ("WanDiTBlock", "WanBlock")
# Never on the training device, so there is nothing to leave out: MindSpeed-MM's own files name them.
ABSENT_MODULES = ("ae", "text_encoder")
TOP_MODULES = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "head")


class ZeroConfig(Section):
    """The section of layer-zero.

    Attributes:
        zero3_size: ranks among which every parameter is sharded; the groups of that size hold copies. It must divide
            the data- times the context-parallel size: MindSpeed takes the smaller of the two in silence, and here a
            size that does not fit is an error.
        transformer_layers: the class that is gathered as one unit, by dotted path; there is one, the block.
        forward_prefetch: gather the next unit's parameters while this one computes.
        param_dtype: of the gathered parameters; must agree with the run's. reduce_dtype: of the gradients' reduction.
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
