"""What a stage copies from host to device in a micro-batch, in a process of its own: a device's name is for life.

Fake tensors can be on a device that this machine does not have; a dispatch mode sees every operator that has an input
in host memory and a result on the device, and whether the process would wait for it.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from mm.config.diffusion import DiffusionConfig
from mm.config.model import WanConfig
from mm.data.loader import FeatureBatch
from mm.diffusion.flow import FlowMatching
from mm.doctor.fake_job import fake_job
from mm.optim.optimizer import Optimizer
from mm.optim.step_statistics import message_size
from mm.parallel.stage import WanStage
from mm.parallel.tokens import TokenShare
from mm.train.step import forward_micro_batch
from mm.wan.model import WanModel

DEVICE = "chip"
SIZES = {
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_heads": 2,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 16,
    "text_len": 8,
}
WAN = {"t2v": WanConfig(**SIZES), "i2v": WanConfig(**SIZES, model_type="i2v", in_dim=36, img_dim=32, clip_token_len=5)}


class Copies(TorchDispatchMode):
    """Copies between host and device while it is entered.

    Attributes:
        asynchronous: of page-locked memory, which nothing waits for. blocking: all others, with what they copy.
        reads: of the device's values by the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous, self.blocking, self.reads = 0, [], 0
        self._locked: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "is_pinned":
            return _storage(args[0]) in self._locked
        if name == "_pin_memory":
            locked = args[0].clone()
            self._locked.add(_storage(locked))
            return locked
        result = func(*args, **kwargs)
        copied = name in ("_to_copy", "copy_", "_copy_from")
        if name == "_local_scalar_dense" and _on_device(args[0]):
            self.reads += 1
        if copied and result.device.type == "cpu" and any(_on_device(x) for x in tree_leaves(args)):
            self.reads += 1
        from_host = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.device.type == "cpu" and x.dim()]
        if copied and from_host and _on_device(result):
            waits = not kwargs.get("non_blocking", args[2:] == (True,)) or _storage(from_host[-1]) not in self._locked
            if waits:
                self.blocking.append(list(from_host[-1].shape))
            else:
                self.asynchronous += 1
        return result


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == DEVICE


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Undrawn(FlowMatching):
    """Timesteps without a value, as `mm.doctor.dry_run` draws them: choosing one reads a random number."""

    def draw_timesteps(self, seed: int, samples: Any, draws: Any, places: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty(len(samples)), torch.empty(len(samples)), torch.empty(len(samples))


def batch(wan: WanConfig, size: tuple[int, int, int], dtype: torch.dtype, ahead: bool) -> FeatureBatch:
    made = FeatureBatch(
        latents=torch.empty(1, 16, *size, dtype=dtype),
        text=torch.empty(1, 8, 16, dtype=dtype),
        sample=["a"],
        draw=[0],
        features={name: torch.empty(1, *shape, dtype=dtype) for name, shape in wan.feature_shapes(size).items()},
    )
    if ahead:
        made["noise"] = torch.empty(1, 16, *size)
    return made


def observe(task: str, size: tuple[int, int, int], *, first: bool, last: bool, ahead: bool) -> dict[str, Any]:
    """Forward, loss and backward of the second micro-batch of a size."""
    wan = WAN[task]
    with torch.device("meta"):
        model = WanModel(wan)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device=DEVICE)))
    config = TransformerConfig(num_layers=2, hidden_size=48, num_attention_heads=2)
    stage = WanStage(config, model, first=first, last=last, tokens=TokenShare(), dtype=torch.float32, vp_stage=None)
    tokens = size[0] * size[1] * size[2] // 4
    stage.boundary_rows = tokens + wan.image_tokens + 8 + 7
    parallel: Any = SimpleNamespace(
        backend=SimpleNamespace(device=torch.device(DEVICE)), wan=wan, mesh=SimpleNamespace(tokens=TokenShare())
    )
    for _ in range(2):
        if not first:
            stage.set_input_tensor(torch.empty(stage.boundary_rows, 1, 48, device=DEVICE, requires_grad=True))
        with Copies() as copies:
            one = batch(wan, size, torch.bfloat16, ahead)
            out, loss = forward_micro_batch(stage, stage, one, Undrawn(DiffusionConfig()), parallel, 0)
            (loss(out)[0] if last else out.sum()).backward()
    return {"asynchronous": copies.asynchronous, "blocking": copies.blocking, "reads": copies.reads}


def tell_all_ranks() -> dict[str, Any]:
    """What the step ends with: the gradients' sums of squares and the losses in one message."""
    shards = [
        SimpleNamespace(name=name, owned=True, start=0, stop=8, gradient=torch.empty(8, device=DEVICE))
        for name in "abc"
    ]
    parallel = SimpleNamespace(backend=SimpleNamespace(device=torch.device(DEVICE)))
    concrete: Any = type("Told", (Optimizer,), dict.fromkeys(Optimizer.__abstractmethods__))
    optimizer = object.__new__(concrete)  # a step's message needs no more of one than this
    vars(optimizer).update(_position={"a": 0, "b": 1, "c": 2}, _shards=shards, _parallel=parallel)
    with Copies() as copies:
        optimizer.gradient_squares(torch.empty(message_size(2), device=DEVICE))
    return {"asynchronous": copies.asynchronous, "blocking": copies.blocking, "reads": copies.reads}


def main() -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for task in WAN:
            for ahead in (True, False):
                for name, (first, last) in {
                    "whole": (True, True),
                    "first": (True, False),
                    "last": (False, True),
                }.items():
                    found[f"{task} {name} {'ahead' if ahead else 'now'}"] = observe(
                        task, (2, 8, 8), first=first, last=last, ahead=ahead
                    )
        with fake_job(0, 1):
            found["message"] = tell_all_ranks()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
