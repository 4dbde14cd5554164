"""Flags about how a model lies on the processes: those that training and generation share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mm.config.flags import Flags
from mm.dialects.mindspeed.flag_paths import sets


class MeshFlags(Flags):
    """Degrees and kinds of parallelism; a command adds its own flags."""

    groups: ClassVar[Mapping[str, str]] = {
        "mm_model": "files",
        "tensor_model_parallel_size": "parallelism",
        "distributed_timeout_minutes": "supervision",
        "device": "device and precision",
    }

    mm_model: str = Field(description="the file of the model")

    tensor_model_parallel_size: int = sets("parallel.tensor_size", 1, ge=1, description="tensor-parallel degree")
    context_parallel_size: int = sets("parallel.context_size", 1, ge=1, description="context-parallel degree")
    sequence_parallel: bool = sets(
        "parallel.sequence_parallel", False, description="cut the tokens outside tensor-parallel layers over TP as well"
    )
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] = sets(
        "parallel.context_algorithm",
        "ulysses_cp_algo",
        description="heads for tokens (ulysses), keys and values in a ring (megatron), or rings of groups (hybrid)",
        values={"ulysses": "ulysses_cp_algo", "ring": "megatron_cp_algo", "hybrid": "hybrid_cp_algo"},
    )
    ulysses_degree_in_cp: int | None = sets(
        "parallel.ulysses_size",
        None,
        ge=1,
        description="ranks of a Ulysses group in the hybrid algorithm; the ring has CP / that many",
    )
    use_cp_send_recv_overlap: bool = sets(
        "parallel.ring_overlap", False, description="the ring sends and receives at the same time"
    )
    cp_window_size: int = sets(
        "parallel.ring_window", 1, ge=1, description="ring ranks of one window of a double ring; 1 is a single ring"
    )
    layerzero: bool = Field(False, description="shard the parameters themselves, as --layerzero-config says")
    layerzero_config: str | None = Field(None, description="zero_config.yaml; with --layerzero")
    distributed_timeout_minutes: int = Field(30, ge=1, description="how long a collective may wait")
    device: Literal["cpu", "cuda", "npu"] | None = Field(None, description="kind of device; default: the best there is")
