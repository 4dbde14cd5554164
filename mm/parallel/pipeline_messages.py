"""Messages between pipeline stages, with a communicator for each direction.

On a communicator NCCL runs messages one after the other in the order in which they were posted. Where both directions
share one, the activations that a stage sends on wait for the gradients that it gets back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor


class PipelineMessages(P2PCommunicator):
    """megatron-core's communicator of a pipeline; its schedules say what is sent when."""

    def __init__(
        self,
        forward: dist.ProcessGroup,
        backward: dist.ProcessGroup,
        config: ModelParallelConfig,
        device: torch.device,
    ) -> None:
        """Send between the ranks of a pipeline.

        Args:
            forward: its ranks, for activations. backward: the same ranks, for gradients.
            config: says the dtype of both.
            device: of this process.
        """
        super().__init__(forward, config)
        self._forward, self._backward, self._device = forward, backward, device

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Sequence[int],
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, dict[str, dist.Work] | None]:
        """Post up to four messages, as megatron-core's does; waiting for them gives None for the requests."""
        from_prev = self._room(tensor_shape) if recv_prev else None
        from_next = self._room(tensor_shape) if recv_next else None
        posts: list[tuple[str, Any, Tensor | None, int, dist.ProcessGroup]] = [
            ("send_next", dist.isend, tensor_send_next, self.next_rank, self._forward),
            ("recv_prev", dist.irecv, from_prev, self.prev_rank, self._forward),
            ("send_prev", dist.isend, tensor_send_prev, self.prev_rank, self._backward),
            ("recv_next", dist.irecv, from_next, self.next_rank, self._backward),
        ]
        # Of two neighbours one sends first and the other receives first, so that neither waits for the other.
        posts.sort(key=lambda post: post[0].startswith("send") == bool(self._forward.rank() % 2))
        requests = {
            name: post(tensor, peer, group=group) for name, post, tensor, peer, group in posts if tensor is not None
        }
        if not wait_on_reqs:
            return from_prev, from_next, requests
        for request in requests.values():
            request.wait()
        return from_prev, from_next, None

    def _room(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, requires_grad=True, device=self._device, dtype=self.config.pipeline_dtype)
