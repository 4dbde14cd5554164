"""One rank of a job of any size, in one process that computes nothing and sends nothing.

torch's "fake" backend makes process groups of ranks that do not exist, and its fake tensors have shapes, dtypes and
storages of a size, but no contents. Under both, the code of a training step runs as on a cluster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import _utils as tensor_utils
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def fake_job(rank: int, world_size: int) -> Iterator[None]:
    """Be this rank of a job for the length of a block; collectives return at once and change nothing.

    Two calls whose results the code reads on the host get an answer without tensors:
    - Objects that ranks tell each other: all ranks tell what this one tells. The one message of this kind in building
      a model asks all ranks which kinds of parameters (decayed or not) they have.
    - At which row a shard of layer-zero begins: torch computes it with small tensors, which stay real.
    """

    def all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * dist.get_world_size(group)

    def offset(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return real_offset(*args, **kwargs)

    real_objects, real_offset = dist.all_gather_object, tensor_utils._compute_local_shape_and_global_offset
    _clear_sharding_prop_cache()  # what it knows is of the rank before: meshes of two ranks are equal to it
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        dist.all_gather_object = all_gather_object  # type: ignore[assignment]
        tensor_utils._compute_local_shape_and_global_offset = offset
        yield
    finally:
        dist.all_gather_object = real_objects
        tensor_utils._compute_local_shape_and_global_offset = real_offset
        dist.destroy_process_group()


class FakeTensors(FakeTensorMode):
    """Every tensor made inside the block is a fake one, except those on the meta device, which have no contents anyway.

    Modules are made on the meta device and then given memory. torch replaces a plain meta parameter by a fake one, but
    cannot replace one fake parameter by another (`torch.utils.swap_tensors`: it has a weak reference).
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(  # type: ignore[override]  # torch annotates the types in two ways
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if FakeTensor not in types and _stays_on_meta(args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _stays_on_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Recognise an operator that makes a meta tensor, or works on some."""
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "meta"
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(not isinstance(x, FakeTensor) and x.device.type == "meta" for x in tensors)
