"""Activations and gradients between two ranks that are each other's neighbour on both sides cannot be swapped."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from ranks import run_ranks
from torch import Tensor

from mm.config.layout import Layout
from mm.config.place import process_place
from mm.device.backend import select
from mm.parallel.mesh import build_mesh
from mm.parallel.pipeline_messages import PipelineMessages
from mm.supervise.job import Job

SHAPE = (3, 1, 4)


@dataclass
class Config:
    """What a communicator asks of megatron-core's configuration."""

    pipeline_dtype: torch.dtype = torch.float32
    virtual_pipeline_model_parallel_size: int | None = 2
    variable_seq_lengths: bool = False
    mtp_standalone: bool = False
    use_ring_exchange_p2p: bool = False
    batch_p2p_comm: bool = False


def swap(theirs: bool) -> dict[str, float]:
    """Each rank sends an activation to the next and a gradient to the one before; in another order than it receives.

    Args:
        theirs: with megatron-core's communicator.
    """
    with (
        Job(process_place(), "gloo", torch.device("cpu"), 1),
        build_mesh(Layout(2, pp_size=2, vp_size=2, stages=((1, 1), (1, 1))), 1, "cpu") as mesh,
    ):
        config: Any = Config()
        messages = (
            P2PCommunicator(mesh.groups.pp, config)
            if theirs
            else PipelineMessages(mesh.groups.pp, mesh.pp_backward, config, torch.device("cpu"))
        )
        me, nothing = dist.get_rank(), {"tensor_shape": SHAPE, "wait_on_reqs": False}

        def post(**what: Any) -> tuple[Any, Any, Any]:
            default = {"tensor_send_next": None, "tensor_send_prev": None, "recv_prev": False, "recv_next": False}
            with select("cpu").megatron():
                return messages._communicate(**{**default, **nothing, **what})  # type: ignore[return-value]

        activation, gradient = torch.full(SHAPE, 10.0 + me), torch.full(SHAPE, 20.0 + me)
        sent = [post(tensor_send_prev=gradient)[2], post(tensor_send_next=activation)[2]]
        from_prev, _, first = post(recv_prev=True)
        _, from_next, second = post(recv_next=True)
        for requests in (*sent, first, second):
            for request in requests.values():
                request.wait()
        return {"activation": value(from_prev), "gradient": value(from_next)}


def value(tensor: Tensor) -> float:
    (only,) = tensor.detach().unique().tolist()
    return float(only)


def test_each_direction_has_its_own_order() -> None:
    expected = [{"activation": 11.0, "gradient": 21.0}, {"activation": 10.0, "gradient": 20.0}]
    assert run_ranks(2, swap, False) == expected


@pytest.mark.nightly
def test_one_communicator_would_swap_them() -> None:
    """So the test above can fail, and the class is needed as long as this holds."""
    found = run_ranks(2, swap, True)
    assert found == [{"activation": 21.0, "gradient": 11.0}, {"activation": 20.0, "gradient": 10.0}]
