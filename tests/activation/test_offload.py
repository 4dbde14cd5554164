"""The offload of kept attention on queues that put every copy off as long as the events between them allow.

A copy that runs too late for a missing wait, a slot written too early, or device memory let go of while a copy still
reads it, then shows as a wrong number or an error; each wait is left out once to see that it does.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from late_queues import LateQueues
from torch import Tensor

from mm.activation import offload
from mm.activation.host_pool import StepShape, make_offloader
from mm.activation.offload import Offloader
from mm.activation.recompute import block_runner
from mm.config.layout import Layout
from mm.config.model import WanConfig, of_task
from mm.config.place import process_place
from mm.config.recompute import Kept, Recompute
from mm.config.tasks.fun_control_ref import FUN_CONTROL_REF
from mm.config.tasks.vace import VACE
from mm.device.backend import select
from mm.device.queues import HostQueues, Queue, TransferEvent, aligned_bytes, queues_of
from mm.errors import ConfigError
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.wan.layers import ModuleFactories
from mm.wan.model import WanModel

LAYERS, WIDTH, HEADS, TOKENS = 6, 32, 4, 24
WAN = WanConfig(text_dim=8, text_len=4, hidden_size=WIDTH, ffn_dim=48, num_heads=HEADS, num_layers=LAYERS, freq_dim=16)
SLOT = 2 * aligned_bytes(TOKENS * WIDTH, 4) + aligned_bytes(TOKENS * HEADS, 4)
KEEP = Recompute(full_layers=0, keep_layers=None, offload=True)


def gradients(offloader: Offloader | None, plan: Recompute | None, passes: int) -> dict[str, Tensor]:
    """Of several micro-batches whose forwards run before the first backward, as in a pipeline."""
    torch.manual_seed(0)
    model = WanModel(WAN, ModuleFactories(run_blocks=block_runner(plan, offloader)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    outputs = []
    for _ in range(passes):
        outputs.append(model.velocity(torch.randn(1, 16, 2, 6, 8), torch.rand(1) * 1000, torch.randn(1, 4, 8)))
    for out in outputs:
        out.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("passes", [1, 3])
def test_the_latest_copies_change_no_bit(passes: int) -> None:
    offloader = Offloader(LateQueues(), passes * (LAYERS - 1), SLOT)
    for _ in range(2):  # the second time every slot is written again
        found, expected = gradients(offloader, KEEP, passes), gradients(None, None, passes)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert offloader.fewest_free == 0


@pytest.mark.parametrize("deaf", [("compute", "to host"), ("compute", "to device")])
def test_every_wait_is_needed(deaf: tuple[Queue, Queue]) -> None:
    offloader = Offloader(LateQueues(deaf), 3 * (LAYERS - 1), SLOT)
    expected = gradients(None, None, 3)
    try:
        gradients(offloader, KEEP, 3)
        found = gradients(offloader, KEEP, 3)
    except RuntimeError as error:
        assert "let go of" in str(error)
        return
    assert not all(torch.equal(found[name], value) for name, value in expected.items())


def test_timeline_of_a_pass() -> None:
    """At most two layers are on the device; a layer is called back while the one after it computes; the last stays."""
    timeline: list[TransferEvent] = []
    gradients(Offloader(queues_of(select("cpu")), LAYERS - 1, SLOT, timeline), KEEP, 1)
    expected: list[tuple[str, int]] = [("to host", 0)]
    for layer in range(1, LAYERS - 1):
        expected += [("to host", layer), ("released", layer - 1)]
    expected += [("released", LAYERS - 2)]
    for layer in reversed(range(LAYERS)):
        expected += [("needed", layer)] + ([("to device", layer - 1)] if layer else [])
    assert [(moment.action, moment.layer) for moment in timeline] == expected

    on_device, most = {LAYERS - 1}, 0
    for moment in timeline:
        if moment.action in ("to host", "to device"):
            on_device.add(moment.layer)
        elif moment.action == "released":
            on_device.remove(moment.layer)
        elif moment.layer < LAYERS - 1:
            on_device.remove(moment.layer + 1)  # its backward is over
        in_use = on_device - ({LAYERS - 1} if moment.action == "to host" else set())  # made last in forward
        most = max(most, len(in_use))
    assert most == 2


def test_passes_under_way_do_not_mix() -> None:
    timeline: list[TransferEvent] = []
    offloader = Offloader(HostQueues(), 3 * (LAYERS - 1), SLOT, timeline)
    gradients(offloader, KEEP, 3)
    copies = Counter((m.action, m.number, m.layer) for m in timeline if m.action != "needed")
    assert set(copies.values()) == {1}
    assert len(copies) == 3 * 3 * (LAYERS - 1)


def test_pool_is_made_once() -> None:
    made: list[int] = []

    class Counting(HostQueues):
        def host_memory(self, num_bytes: int) -> Tensor:
            made.append(num_bytes)
            return super().host_memory(num_bytes)

    offloader = Offloader(Counting(), 2 * (LAYERS - 1), SLOT)
    for _ in range(3):
        gradients(offloader, KEEP, 2)
    assert made == [2 * (LAYERS - 1) * SLOT]


@pytest.mark.parametrize(
    ("wan", "kept", "group_size"),
    [
        (of_task(WAN, VACE, vace_layers=(0, 2, 3)), "O", 1),
        (of_task(WAN, VACE, vace_layers=(0, 2, 3)), "q,k,v,O", 2),
        (of_task(WAN, FUN_CONTROL_REF, img_dim=8, clip_token_len=3), "O", 1),
    ],
    ids=["side blocks", "side blocks, pairs", "reference"],
)
def test_a_slot_is_as_large_as_what_waits_in_it(
    monkeypatch: pytest.MonkeyPatch, wan: WanConfig, kept: Kept, group_size: int
) -> None:
    """With side blocks there are two streams and their attention too; a reference makes every stream longer."""
    used, place = [], offload._Layer.place

    def watched(layer: Any, tensor: Tensor) -> Tensor:
        found = place(layer, tensor)
        used.append(layer.used)
        return found

    monkeypatch.setattr(offload._Layer, "place", watched)
    size = (2, 6, 8)
    plan = Recompute(group_size=group_size, full_layers=0, keep_layers=None, kept=kept, offload=True)
    backend = select("cpu")
    with Job(process_place(), "gloo", backend.device, 1), build_mesh(Layout(1), 1, "cpu") as mesh:
        step = StepShape(1, wan.num_tokens(size), micro_batches=1, dtype=torch.float32)
        offloader = make_offloader(plan, wan, mesh, backend, step)
    assert offloader is not None
    model = WanModel(wan, ModuleFactories(run_blocks=block_runner(plan, offloader)))
    model.init_weights(0)
    features = {name: torch.randn(1, *shape) for name, shape in wan.feature_shapes(size).items()}
    noisy = torch.randn(1, wan.noise_channels, *size)
    model.velocity(noisy, torch.rand(1) * 1000, torch.randn(1, 4, 8), **features).square().mean().backward()
    assert max(used) == offloader.slot_bytes
    assert offloader.fewest_free == 0


def test_too_little_host_memory_is_told_before_it_is_taken() -> None:
    wan = WanConfig(hidden_size=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    plan = Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O", offload=True)
    backend = select("cpu")
    with Job(process_place(), "gloo", backend.device, 1), build_mesh(Layout(1), 1, "cpu") as mesh:
        step = StepShape(micro_batch_size=1, num_tokens=75_600, micro_batches=1, dtype=torch.bfloat16)
        with pytest.raises(ConfigError) as caught:
            make_offloader(plan, wan, mesh, backend, step, processes_of_node=10**6)
    assert [problem.id for problem in caught.value.problems] == ["CFG-049"]
    # 39 layers leave, of x, q, k, v, O in bf16 and a log-sum-exp in fp32 for each head
    assert f"needs {39 * 75_600 * (5 * 2 * 5120 + 4 * 40) / 2**30:.2f} GiB" in str(caught.value)


def test_a_forward_without_gradients_keeps_nothing() -> None:
    offloader = Offloader(HostQueues(), 0, SLOT)
    model = WanModel(WAN, ModuleFactories(run_blocks=block_runner(KEEP, offloader)))
    with torch.no_grad():
        model.velocity(torch.randn(1, 16, 2, 6, 8), torch.rand(1), torch.randn(1, 4, 8))
