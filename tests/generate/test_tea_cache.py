"""TeaCache: the steps that it leaves out, against the numbers of another system, and the blocks that run."""

import json
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family import config
from safetensors.torch import load_file
from torch import Tensor

from mm.config.model import WanConfig
from mm.diffusion.samplers import make_sampler
from mm.generate.experts import TwoExperts
from mm.generate.pipeline import denoise
from mm.generate.tea_cache import COEFFICIENTS, TeaCache, TeaCacheSettings
from mm.generate.windows import Windowed, WindowSettings
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel

MODEL = "Wan2.1-T2V-1.3B"
STEPS, SHIFT, GUIDANCE = 12, 3.0, 4.0
MUCH_REUSED = 0.4


@cache
def oracle() -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = os.environ.get("MM_ORACLES")
    if not folder:
        pytest.skip("MM_ORACLES is not set; it names the folder of numbers of other systems")
    return json.loads((Path(folder) / "teacache.json").read_text()), load_file(Path(folder) / "teacache.safetensors")


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("model", COEFFICIENTS)
def test_steps_left_out_are_those_of_diffsynth(model: Any, threshold: float) -> None:
    facts, tensors = oracle()
    (row,) = [row for row in facts["rows"] if (row["model_id"], row["threshold"]) == (model, threshold)]
    assert COEFFICIENTS[model] == pytest.approx(facts["coefficients"][model], rel=1e-12)
    modulated, hidden = tensors[f"{model}.modulated"], tensors[f"{model}.hidden"]
    reuse = TeaCache(TeaCacheSettings(threshold, model), facts["steps"])
    computed, found = [], []

    def blocks(step: int) -> tuple[Tensor]:
        computed.append(step)
        return (hidden[step].view(1, 1, -1) * 1.5 + step,)

    for step in range(facts["steps"]):
        (out,) = reuse.at(step)(modulated[step], (hidden[step].view(1, 1, -1),), lambda step=step: blocks(step))
        found.append(out.flatten())
        (state,) = reuse._states.values()
        assert state.change == pytest.approx(row["accumulated"][step], abs=1e-5)
    assert sorted(set(range(facts["steps"])) - set(computed)) == row["skipped_steps"]
    assert (reuse.computed, reuse.skipped) == (len(computed), len(row["skipped_steps"]))
    torch.testing.assert_close(torch.stack(found), tensors[f"{model}.{threshold}.out"], rtol=0, atol=1e-5)


def model_of(task: str, seed: int = 0) -> WanModel:
    model = WanModel(config(task))
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source) * (0.2 if parameter.dim() > 1 else 0.05)
    return model.eval().requires_grad_(False)


def features_of(wan: WanConfig, frames: int = 3) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(4)
    shapes = wan.feature_shapes((frames, 4, 6))
    made = {name: torch.randn(1, *shape, generator=source) for name, shape in shapes.items() if name != "vace_scale"}
    return made | ({"motion_bucket_id": torch.tensor([30.0])} if "motion_bucket_id" in made else {})


def counted(model: WanModel) -> Counter[str]:
    """Calls of each block, from now on."""
    calls: Counter[str] = Counter()
    for name, block in model.named_modules():
        if name.rpartition(".")[0] in ("blocks", "vace_blocks"):
            block.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def latents_of(model: Any, wan: WanConfig, reuse: TeaCache | None, batched: bool = False, guidance: Any = GUIDANCE):
    source = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, 3, 4, 6, generator=source)
    text, negative = torch.randn(2, 1, wan.text_len, wan.text_dim, generator=source)
    return denoise(
        model, noise, text, negative, make_sampler("euler", STEPS, SHIFT), guidance, features=features_of(wan),
        batched_guidance=batched, reuse_at=None if reuse is None else reuse.at,
    )  # fmt: skip


def tea_cache(threshold: float) -> TeaCache:
    return TeaCache(TeaCacheSettings(threshold, MODEL), STEPS)


@pytest.mark.parametrize("task", ["t2v", "vace", "fun_control_ref", "fun_camera", "speedcontrol"])
@pytest.mark.parametrize("batched", [False, True])
def test_blocks_do_not_run_at_steps_left_out(task: str, batched: bool) -> None:
    model = model_of(task)
    whole = latents_of(model, model.config, None, batched)
    calls, reuse = counted(model), tea_cache(MUCH_REUSED)
    latents = latents_of(model, model.config, reuse, batched)
    passes = STEPS * (1 if batched else 2)
    assert reuse.computed + reuse.skipped == passes
    assert 2 <= reuse.computed < passes - 4
    assert set(calls.values()) == {reuse.computed}  # side blocks too
    assert set(calls) == {
        f"{kind}.{index}" for kind in ("blocks", *["vace_blocks"] * (task == "vace")) for index in (0, 1)
    }
    assert 1e-3 < (latents - whole).abs().max() / whole.abs().max() < 1


@pytest.mark.parametrize("task", ["t2v", "vace"])
def test_with_nothing_left_out_every_bit_is_as_without(task: str) -> None:
    """This polynomial is above the threshold everywhere."""
    model, reuse = model_of(task), TeaCache(TeaCacheSettings(1e-9, "Wan2.1-I2V-14B-480P"), STEPS)
    assert torch.equal(latents_of(model, model.config, None), latents_of(model, model.config, reuse))
    assert (reuse.computed, reuse.skipped) == (2 * STEPS, 0)


def test_both_prompts_in_one_pass_decide_once_and_alike() -> None:
    """The time modulation knows nothing of the prompt, so that each pass by itself decides the same."""
    model = model_of("t2v")
    apart, together = tea_cache(MUCH_REUSED), tea_cache(MUCH_REUSED)
    two = latents_of(model, model.config, apart)
    one = latents_of(model, model.config, together, batched=True)
    assert (apart.computed, apart.skipped) == (2 * together.computed, 2 * together.skipped)
    assert (one - two).abs().max() / two.abs().max() < 1e-6


def test_a_step_adds_what_its_own_prompt_added() -> None:
    """Blocks that add a number that depends on the prompt alone may be left out without any change."""
    wan = config("t2v")
    seen = []

    def model(inputs: ModelInputs) -> Tensor:
        before = inputs.latents.flatten(2).transpose(1, 2)
        modulation = torch.full((1, 6, 4), 1 + float(inputs.timestep[0]) / 1e6)
        assert inputs.reuse is not None
        (after,) = inputs.reuse(modulation, (before,), lambda: (seen.append(1) or before + inputs.text.mean(),))
        return (after - before).transpose(1, 2).unflatten(2, inputs.latents.shape[2:])

    reuse = tea_cache(MUCH_REUSED)

    def without(inputs: ModelInputs) -> Tensor:
        return torch.full_like(inputs.latents, float(inputs.text.mean()))

    expected = latents_of(without, wan, None)
    torch.testing.assert_close(latents_of(model, wan, reuse), expected, rtol=0, atol=1e-4)
    assert len(seen) == reuse.computed < 2 * STEPS


def test_an_expert_begins_anew() -> None:
    """The first step of each is computed, and nothing that the other has left is used."""
    high, low = model_of("t2v", 0), model_of("t2v", 1)
    of_high, of_low = counted(high), counted(low)
    boundary = 0.8
    timesteps = make_sampler("euler", STEPS, SHIFT).timesteps
    num_high = int((timesteps >= 1000 * boundary).sum())
    assert 2 < num_high < STEPS - 2
    firsts, reuse = [], tea_cache(1e9)  # leaves out all that it may

    def recorded(inputs: ModelInputs) -> Tensor:
        firsts.append((float(inputs.timestep[0]), of_high["blocks.0"], of_low["blocks.0"]))
        return TwoExperts(high, low, boundary)(inputs)

    latents_of(recorded, high.config, reuse)
    # both prompts of each expert's first step, and of the last step of all
    assert (of_high["blocks.0"], of_low["blocks.0"]) == (2, 4)
    switch = [entry for entry in firsts if entry[0] < 1000 * boundary]
    assert [entry[2] for entry in switch[:3]] == [0, 1, 2]
    assert {parts[-1] for parts in reuse._states} == {"low"}  # what the other one left is not kept


def test_each_window_has_a_state() -> None:
    model = model_of("t2v")
    calls, reuse = counted(model), tea_cache(1e9)
    latents_of(Windowed(model, model.config, WindowSettings(2, 1)), model.config, reuse)
    assert calls["blocks.0"] == reuse.computed == 2 * 2 * 2  # first and last step, prompts, windows
    assert reuse.skipped == 2 * 2 * (STEPS - 2)


def test_ranks_that_gather_weights_decide_together() -> None:
    model, asked = model_of("t2v"), []

    def others_compute(mine: bool) -> bool:
        asked.append(mine)
        return False

    reuse = TeaCache(TeaCacheSettings(1e9, MODEL), STEPS, others_compute)
    latents_of(model, model.config, reuse)
    assert (reuse.computed, reuse.skipped) == (2 * STEPS, 0)
    assert asked.count(True) == 2 * (STEPS - 2)
