"""Plans that keep to limits, and the working memory of a forward that they leave room for."""

import pytest
import torch
from held_models import TINY, WITH_SIDES

from mm.config.model import WanConfig, of_task
from mm.config.run.residency import Residency
from mm.config.tasks.vace import VACE
from mm.doctor.memory_tracker import ACTIVATIONS, TrackMemory
from mm.errors import ConfigError
from mm.residency.budget import Room, forward_bytes, plan_weights
from mm.residency.hold import block_sizes, other_bytes
from mm.residency.plan import WeightPlan, evenly
from mm.wan.model import WanModel

MUCH = 2**40
KIB = 1024


def on_meta(wan: WanConfig) -> WanModel:
    with torch.device("meta"):
        return WanModel(wan).requires_grad_(False)


@pytest.mark.parametrize("wan", [TINY, WITH_SIDES], ids=["t2v", "side blocks"])
@pytest.mark.parametrize("transformers", [1, 2])
def test_a_limit_is_kept_and_used(wan: WanConfig, transformers: int) -> None:
    """With one block more on the device it would be broken."""
    model = on_meta(wan)
    blocks, others, beside = block_sizes(model), other_bytes(model), 4567
    largest = max(block.num_bytes for block in blocks)
    for kib in range(120, 1200, 13):
        asked = Residency(device_limit=f"{kib}KiB", device_buffer="10KiB")
        try:
            plan = plan_weights(model, asked, Room(MUCH, beside, transformers))
        except ConfigError as error:
            assert error.problems[0].id == "CFG-373"
            assert transformers * (others + 2 * largest) + beside + 10 * KIB > kib * KIB
            continue
        room = kib * KIB - beside - 10 * KIB
        assert transformers * (others + plan.device_bytes(blocks)) <= room
        if plan.copied:
            fewer = len(plan.copied) - 1 if len(plan.copied) > 3 else 0
            assert transformers * (others + WeightPlan(evenly(len(blocks), fewer)).device_bytes(blocks)) > room


def test_parameters_that_stay_count_those_outside_of_blocks() -> None:
    model = on_meta(TINY)
    total = sum(p.numel() for p in model.parameters())
    each = block_sizes(model)[0].num_parameters
    for staying, copied in ((total, 0), (total - 1, 3), (total - 3 * each, 3), (total - 3 * each - 1, 4), (0, 6)):
        assert len(plan_weights(model, Residency(staying_parameters=staying), Room(MUCH)).copied) == copied


def test_host_memory_that_is_not_there() -> None:
    model = on_meta(TINY)
    size = block_sizes(model)[0].num_bytes
    asked = Residency(staying_parameters=0)
    assert plan_weights(model, asked, Room(6 * size)).from_files == frozenset()
    with pytest.raises(ConfigError, match="CFG-374"):
        plan_weights(model, asked, Room(6 * size - 1))  # files are read when it is asked for, and not in silence
    limited = Residency(staying_parameters=0, host_limit=f"{2 * size}B")
    assert len(plan_weights(model, limited, Room(MUCH)).from_files) == 6
    with pytest.raises(ConfigError, match="CFG-374"):
        plan_weights(model, limited, Room(2 * size - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ffn_dim", "sides"), [(344, False), (344, True), (896, False), (128, True)])
def test_a_forward_takes_no_more_than_it_is_given(ffn_dim: int, sides: bool, dtype: torch.dtype) -> None:
    wan = WanConfig(text_dim=8, text_len=4, hidden_size=128, ffn_dim=ffn_dim, num_heads=4, num_layers=2, freq_dim=16)
    wan = of_task(wan, VACE, vace_layers=(0, 1)) if sides else wan
    model = WanModel(wan).to_precision(dtype).requires_grad_(False)
    model.init_weights(0)
    size = (2, 64, 64)
    features = {name: torch.zeros(1, *shape) for name, shape in wan.feature_shapes(size).items()}
    latents, text = torch.zeros(1, wan.noise_channels, *size), torch.zeros(1, 4, 8)
    with torch.no_grad(), TrackMemory(ACTIVATIONS) as memory:
        model.velocity(latents, torch.tensor([5.0]), text, **features)
    used = sum(memory.peak().values())
    bound = forward_bytes(wan, wan.num_tokens(size), 1, dtype.itemsize)
    assert used <= bound < 1.6 * used  # fp32 makes no fp32 copies, and needs the least of it
