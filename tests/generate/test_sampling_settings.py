"""Settings that make sampling shorter or smaller: their words, the rules about them, and clips made with them."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_runs import GUIDANCE, NEGATIVE, PROMPTS, SEED, SHIFT, SIZE, generate
from test_inference_config import load, refused, shipped

from mm import Encoders, SamplingOptions, generate_videos, load_model
from mm.config.flags import parse_flags
from mm.config.rules.generation import GENERATION_RULES
from mm.config.unread import broken
from mm.dialects.mindspeed.generate import translate
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.reading import Reading
from mm.errors import ConfigError
from mm.generate.render import clip_plan

TEA_CACHE = "--tea-cache-l1-thresh 0.3 --tea-cache-model-id Wan2.1-T2V-1.3B"
WINDOWS = "--sliding-window-size 2 --sliding-window-stride 1"


@pytest.mark.parametrize("by_flags", [True, False])
def test_flags_and_keys_say_the_same(by_flags: bool, tmp_path: Path) -> None:
    values, words = shipped(), {}
    if by_flags:
        flags = parse_flags(GenerateFlags, shlex.split(f"--mm-model x {TEA_CACHE} {WINDOWS}"), program="generate")
        words = flags.model_dump(exclude={"mm_model", "load"})
    else:
        values["diffusion"] |= {
            "tea_cache_l1_thresh": 0.3, "tea_cache_model_id": "Wan2.1-T2V-1.3B", "sliding_window_size": 2,
            "sliding_window_stride": 1,
        }  # fmt: skip
    sampling = load(tmp_path, values, **words).sampling
    assert (sampling.tea_cache, sampling.windows) == ((0.3, "Wan2.1-T2V-1.3B"), (2, 1))
    plain = load(tmp_path, shipped()).sampling
    assert (plain.tea_cache, plain.windows) == (None, None)


@pytest.mark.parametrize(
    ("diffusion", "expected"),
    [
        ({"tea_cache_l1_thresh": 0.1}, ("CFG-320", "tea_cache_l1_thresh", "Give --tea-cache-model-id too")),
        ({"tea_cache_model_id": "Wan2.1-T2V-14B"}, ("CFG-320", "tea_cache_model_id", "Give --tea-cache-l1-thresh too")),
        ({"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan2.1-T2V-14B", "num_inference_steps": 2},
         ("CFG-321", "clips of 2 steps", "take more steps")),
        ({"tea_cache_l1_thresh": 0.0, "tea_cache_model_id": "Wan2.1-T2V-14B"}, ("CFG-005", "tea_cache_l1_thresh", "")),
        ({"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan3"}, ("CFG-005", "tea_cache_model_id", "")),
        ({"sliding_window_size": 9}, ("CFG-322", "sliding_window_size", "Give --sliding-window-stride too")),
        ({"sliding_window_stride": 9}, ("CFG-322", "sliding_window_stride", "Give --sliding-window-size too")),
        ({"sliding_window_size": 4, "sliding_window_stride": 5}, ("CFG-322", "4 latent frames every 5", "stride")),
        ({"sliding_window_size": 21, "sliding_window_stride": 5}, ("CFG-323", "has 21", "fewer than 21")),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(diffusion: dict[str, Any], expected: tuple[str, str, str], tmp_path: Path) -> None:
    values = shipped()
    values["diffusion"] |= diffusion
    (problem,) = refused(tmp_path, values)
    assert problem.id == expected[0]
    assert expected[1] in problem.message and expected[2] in problem.remedy


def test_steps_that_a_given_video_leaves_are_too_few(tmp_path: Path) -> None:
    """Of 8 steps at strength 0.25 two are taken, which both are computed."""
    values = json.loads((Path(__file__).parents[2] / "examples/wan2.1/1.3b/v2v/inference_model.json").read_text())
    values["diffusion"] |= {"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan2.1-T2V-1.3B"}
    assert load(tmp_path, values).sampling.tea_cache is not None
    values["diffusion"]["num_inference_steps"], values["pipeline_config"]["strength"] = 8, 0.25
    (problem,) = refused(tmp_path, values)
    assert (problem.id, "clips of 2 steps" in problem.message) == ("CFG-321", True)


def test_clips_with_steps_left_out_in_windows(
    workplace: Path, weights: Path, frames: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The command and the Python API leave out the same, and say how much."""
    steps = 6
    settings = ["--num-inference-steps", str(steps), *shlex.split(f"{TEA_CACHE} {WINDOWS}")]
    with caplog.at_level(logging.INFO):
        generate(weights, "--micro-batch-size", str(len(PROMPTS)), *settings)
    passes = steps * 2 * 2  # prompts, windows
    (line,) = [line for line in caplog.messages if line.startswith("TeaCache")]
    left_out = int(line.split()[6])
    assert line == f"TeaCache left the blocks out in {left_out} of {passes} passes" and 4 <= left_out <= passes - 8
    said = json.loads((workplace / "clips/video_0000.json").read_text())
    assert (said["tea_cache_l1_thresh"], said["tea_cache_model_id"]) == (0.3, "Wan2.1-T2V-1.3B")
    assert (said["sliding_window_size"], said["sliding_window_stride"]) == (2, 1)
    made = generate_videos(
        load_model(weights / "transformer", dtype="fp32", device="cpu", text_len=512), PROMPTS,
        Encoders.of(weights, text_dtype="fp32"), negative_prompt=NEGATIVE, size=tuple(SIZE), steps=steps,
        guidance_scale=GUIDANCE, shift=SHIFT, seed=SEED, batch_size=len(PROMPTS),
        options=SamplingOptions((0.3, "Wan2.1-T2V-1.3B"), (2, 1)),
    )  # fmt: skip
    for index, clip in enumerate(made):
        assert np.array_equal(clip.numpy(), frames[f"video_{index:04d}.mp4"])


def test_arguments_that_cannot_be_meant(weights: Path) -> None:
    model = load_model(weights / "transformer", dtype="fp32", device="cpu")
    with pytest.raises(ConfigError) as caught:
        options = SamplingOptions((0.0, "Wan3"), (2, 3))  # type: ignore[arg-type]
        generate_videos(model, PROMPTS, Encoders.of(weights), size=(9, 32, 48), steps=2, options=options)
    assert [problem.id for problem in caught.value.problems] == ["CFG-200", "CFG-321", "CFG-321", "CFG-322"]
    with pytest.raises(ConfigError) as caught:
        generate_videos(model, PROMPTS, Encoders.of(weights), size=(9, 32, 48), options=SamplingOptions(windows=(3, 2)))
    assert [problem.id for problem in caught.value.problems] == ["CFG-323"]


@pytest.mark.parametrize(
    ("precision", "words", "ids"),
    [
        ("bf16", {}, []),
        ("fp32", {}, ["CFG-325"]),
        ("bf16", {"device": "cpu"}, ["CFG-325"]),
        ("bf16", {"context_parallel_size": 2}, []),
        ("bf16", {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}, ["CFG-325"]),
    ],
)
def test_sage_attention_is_for_16_bits_on_cuda_without_a_ring(
    precision: str, words: dict[str, Any], ids: list[str], tmp_path: Path
) -> None:
    values = shipped()
    values["predictor"]["dtype"] = precision
    path = tmp_path / "model.json"
    path.write_text(json.dumps(values))
    flags = GenerateFlags(mm_model=str(path), load="weights", sample_attention="sage", **words)
    run = translate(flags, Reading(), world_size=words.get("context_parallel_size", 1))
    assert [problem.id for problem in broken(GENERATION_RULES, run)] == ids
    assert run.sampling.attention == "sage"


def test_sage_attention_on_the_cpu_is_refused(weights: Path) -> None:
    with pytest.raises(ConfigError, match="CFG-325"):
        load_model(weights / "transformer", device="cpu", attention="sage")


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ({}, []),
        ({"enable_tiling": True, "tile_blend": "masks"}, []),
        ({"tile_blend": "masks"}, ["CFG-055"]),
        ({"enable_tiling": True, "tile_blend": "other"}, ["CFG-005"]),
    ],
)
def test_tiles_are_put_together_in_a_known_way(words: dict[str, Any], ids: list[str], tmp_path: Path) -> None:
    values = shipped()
    values["ae"] |= words
    if ids:
        assert [problem.id for problem in refused(tmp_path, values)] == ids
    else:
        assert load(tmp_path, values).encoders.vae.tile_blend == words.get("tile_blend")


@pytest.mark.parametrize(
    ("diffusion", "ids"),
    [({}, []), ({"solver_order": 3}, []), ({"solver_type": "bh1"}, ["CFG-063"])],
)
def test_dpm_has_an_order_and_no_type(diffusion: dict[str, Any], ids: list[str], tmp_path: Path) -> None:
    values = shipped()
    values["diffusion"] = {"num_inference_steps": 4, "flow_shift": 3.0, **diffusion}
    if ids:
        assert [problem.id for problem in refused(tmp_path, values, sample_solver="dpm++")] == ids
    else:
        sampling = load(tmp_path, values, sample_solver="dpm++").sampling
        assert (sampling.solver, sampling.solver_order) == ("dpm++", diffusion.get("solver_order"))


def test_steps_of_a_strength(tmp_path: Path) -> None:
    values = json.loads((Path(__file__).parents[2] / "examples/wan2.1/1.3b/v2v/inference_model.json").read_text())
    values["pipeline_config"] |= {"strength": 0.5, "strength_steps": "all"}
    run = load(tmp_path, values)
    assert run.inputs.num_evaluated(run.sampling.steps) == run.sampling.steps
    plan = clip_plan(run, torch.device("cpu"))
    assert plan.settings.num_evaluated == run.sampling.steps
    values["pipeline_config"]["strength_steps"] = "last"
    run = load(tmp_path, values)
    assert run.inputs.num_evaluated(run.sampling.steps) == run.sampling.steps // 2
    assert clip_plan(run, torch.device("cpu")).settings.num_evaluated == run.sampling.steps // 2
    values = shipped()
    values["pipeline_config"]["strength_steps"] = "all"
    assert [problem.id for problem in refused(tmp_path, values)] == ["CFG-121"]
