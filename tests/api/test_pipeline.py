"""The pipeline that people script: models found by their content, and the clips that `generate_videos` makes."""

import json
import logging
import math
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from published_names import key_shape_md5
from released import COMMON, COMMON_OF_IMAGES, released_config, write_common_files, write_release
from safetensors.torch import load_file, save_file

import mm
from mm import ModelConfig, WanVideoPipeline
from mm.api.pipeline_parts import find_parts
from mm.config.model import PUBLISHED
from mm.config.tasks.registry import TASKS
from mm.errors import MMError
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter
from mm.poses import direction_rows
from mm.wan.model import whole_shapes

T5_FILE, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WEIGHTS = "diffusion_pytorch_model*.safetensors"
MODELS = {
    "t2v": COMMON,
    "i2v": COMMON_OF_IMAGES,
    "flf2v": "Wan-AI/Wan2.1-FLF2V-14B-720P",
    "fun_control": "PAI/Wan2.1-Fun-1.3B-Control",
    "fun_control_ref": "PAI/Wan2.1-Fun-V1.1-1.3B-Control",
    "fun_camera": "PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera",
    "vace": "Wan-AI/Wan2.1-VACE-1.3B",
}
SIZE = {"num_frames": 5, "height": 32, "width": 48}
SHORT = {**SIZE, "num_inference_steps": 2, "cfg_scale": 3.0, "seed": 5, "progress_bar_cmd": lambda steps: steps}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_common_files(folder)
    for task, model_id in MODELS.items():
        write_release(folder, model_id, task, shards=3 if task == "fun_control" else 1)
    controller = {
        name.removeprefix("motion_controller."): torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for name, shape in whole_shapes(released_config("speedcontrol")).items()
        if name.startswith("motion_controller.")
    }
    home = folder / "DiffSynth-Studio" / "Wan2.1-1.3b-speedcontrol-v1"
    home.mkdir(parents=True)
    save_file(controller, home / "model.safetensors")
    return folder


def configs(model_id: str, *, image: bool = False) -> list[ModelConfig]:
    """As the guide writes them: every file under the model's own id."""
    patterns = [WEIGHTS, T5_FILE, VAE_FILE, *[CLIP_FILE] * image]
    return [ModelConfig(model_id=model_id, origin_file_pattern=pattern) for pattern in patterns]


def pipeline(models: Path, task: str, *more: ModelConfig) -> WanVideoPipeline:
    seen = TASKS[task].sizes.get("img_dim") is not None
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[*configs(MODELS[task], image=seen), *more],
        local_model_path=models,
        skip_download=True,
    )


def picture(seed: int, height: int = 32, width: int = 48) -> Image.Image:
    source = np.random.default_rng(seed)
    return Image.fromarray(source.integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(seed: int) -> list[Image.Image]:
    return [picture(seed + frame) for frame in range(SIZE["num_frames"])]


def pixels(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.array(frame) for frame in frames])


def expected(pipe: WanVideoPipeline, latent_frames: int = 2, **more: Any) -> np.ndarray:
    """Frames that `generate_videos` makes of the noise that DiffSynth-Studio draws: the first numbers of the seed."""
    noise = torch.randn((1, 16, latent_frames, 4, 6), generator=torch.Generator("cpu").manual_seed(5))[0]
    in_front = latent_frames - 2
    noise = torch.cat((noise[:, 2:], noise[:, :2]), dim=1) if in_front else noise
    encoders = mm.Encoders(pipe.vae, pipe.text_encoder, image_encoder=pipe.image_encoder)
    [frames] = mm.generate_videos(
        pipe.dit, ["a red disc"], encoders, size=(5, 32, 48), steps=2, guidance_scale=3.0, shift=5.0, solver="euler",
        negative_prompt="", noise=[noise], **more,
    )  # fmt: skip
    return frames.numpy()


def test_text_alone(models: Path) -> None:
    pipe = pipeline(models, "t2v")
    found = pixels(pipe("a red disc", **SHORT))
    assert np.array_equal(found, expected(pipe))
    assert not np.array_equal(found, pixels(pipe("a red disc", **{**SHORT, "seed": 6})))
    assert not np.array_equal(
        pixels(pipe("a", **{**SHORT, "seed": None})), pixels(pipe("a", **{**SHORT, "seed": None}))
    )


def test_sampling_in_windows_and_without_blocks(models: Path) -> None:
    pipe = pipeline(models, "t2v")
    words = {"sliding_window_size": 1, "sliding_window_stride": 1}
    found = pixels(pipe("a red disc", **words, **SHORT))
    assert np.array_equal(found, expected(pipe, options=mm.SamplingOptions(windows=(1, 1))))
    assert not np.array_equal(found, expected(pipe))
    for wrong, id in [
        ({"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan2.1-T2V-1.3B"}, "CFG-321.* 2 steps"),
        ({"tea_cache_l1_thresh": 0.1}, "CFG-446.*Wan2.1-I2V-14B-720P"),
        ({"sliding_window_size": 1}, "CFG-322"),
    ]:
        with pytest.raises(MMError, match=id):
            pipe("a", **wrong, **SHORT)


def test_images(models: Path) -> None:
    pipe = pipeline(models, "i2v")
    start, end = picture(1), picture(2)
    found = pixels(pipe("a red disc", input_image=start, **SHORT))
    assert np.array_equal(found, expected(pipe, images=[[np.array(start)]]))
    both = pixels(pipe("a red disc", input_image=start, end_image=end, **SHORT))
    assert np.array_equal(both, expected(pipe, images=[[np.array(start), np.array(end)]]))
    assert np.array_equal(pixels(pipe("a red disc", **SHORT)), expected(pipe, text_only=True))
    with pytest.raises(MMError, match="CFG-446: end_image is given without input_image"):
        pipe("a red disc", end_image=end, **SHORT)  # which would be taken for the first frame
    pipe.image_encoder = None
    with pytest.raises(MMError, match="CFG-404: model_configs names no image encoder"):
        pipe("a red disc", input_image=start, **SHORT)


def test_control_and_reference(models: Path) -> None:
    pipe = pipeline(models, "fun_control")
    control = video(3)
    assert np.array_equal(
        pixels(pipe("a red disc", control_video=control, **SHORT)), expected(pipe, controls=[pixels(control)])
    )
    pipe = pipeline(models, "fun_control_ref")
    reference = picture(9)
    assert np.array_equal(
        pixels(pipe("a red disc", control_video=control, reference_image=reference, **SHORT)),
        expected(pipe, controls=[pixels(control)], references=[np.array(reference)]),
    )


def test_camera(models: Path) -> None:
    pipe = pipeline(models, "fun_camera")
    start = picture(1)
    words = {"camera_control_direction": "LeftUp", "camera_control_speed": 0.02}
    found = pixels(pipe("a red disc", input_image=start, **words, **SHORT))
    path = direction_rows("LeftUp", 5, 0.02)
    assert np.array_equal(found, expected(pipe, images=[np.array(start)], cameras=[path]))


def test_edited_video_with_references(models: Path) -> None:
    """Two references: their latents are in front, and their noise is the last that is drawn."""
    pipe = pipeline(models, "vace")
    edited, references = video(3), [picture(20, 24, 40), picture(21)]
    mask = [Image.fromarray(np.full((32, 48), 255 if frame > 1 else 0, np.uint8)) for frame in range(5)]
    found = pixels(
        pipe(
            "a red disc", vace_video=edited, vace_video_mask=mask, vace_reference_image=references, vace_scale=0.7,
            **SHORT,
        )
    )  # fmt: skip
    shown = {
        "videos": [pixels(edited)],
        "masks": [pixels(mask)],
        "references": [references],
        "vace_scale": 0.7,
    }
    assert np.array_equal(found, expected(pipe, latent_frames=4, **shown))


@pytest.mark.parametrize("task", ["i2v", pytest.param("vace", marks=pytest.mark.nightly)])
def test_strength(models: Path, task: str) -> None:
    """The video that a clip begins as is apart from what the model sees; all steps are taken, as there."""
    pipe, begins, start, edited = pipeline(models, task), video(3), picture(1), video(30)
    seen = {"input_image": start} if task == "i2v" else {"vace_video": edited}
    shown: dict[str, Any] = {"images": [np.array(start)]} if task == "i2v" else {"videos": [pixels(edited)]}
    found = pixels(pipe("a red disc", input_video=begins, denoising_strength=0.6, **seen, **SHORT))
    name, options = "videos" if task == "i2v" else "input_videos", mm.SamplingOptions(strength_steps="all")
    shown[name] = [pixels(begins)]
    assert np.array_equal(found, expected(pipe, strength=0.6, options=options, **shown))
    assert not np.array_equal(found, pixels(pipe("a red disc", **seen, **SHORT)))
    with pytest.raises(MMError, match=r"CFG-121: denoising_strength has no effect without input_video"):
        pipe("a", denoising_strength=0.6, **seen, **SHORT)


def test_a_module_that_is_released_alone(models: Path) -> None:
    """Speed control beside the model of text to video."""
    alone = ModelConfig(
        model_id="DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1", origin_file_pattern="model.safetensors"
    )
    pipe = pipeline(models, "t2v", alone)
    assert pipe.dit.config.task.name == "speedcontrol"
    weight = load_file(models / alone.model_id / "model.safetensors")["linear.2.weight"]
    assert torch.equal(pipe.dit.get_parameter("motion_controller.linear.2.weight"), weight)
    found = pixels(pipe("a red disc", motion_bucket_id=40, **SHORT))
    assert np.array_equal(found, expected(pipe, columns={"motion_bucket_id": [40.0]}))


def test_sizes_are_rounded_up_and_said(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline(models, "t2v")
    frames = pipe("a", **{**SHORT, "num_frames": 2, "height": 30, "width": 33})
    assert len(frames) == 5 and frames[0].size == (48, 32)
    assert "2x30x33 frames, height and width are rounded up to 5x32x48." in caplog.text


def test_an_image_of_other_proportions_is_said(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline(models, "i2v")
    wide = picture(1, 16, 96)
    found = pixels(pipe("a red disc", input_image=wide, **SHORT))
    assert "input_image is 16x96 and is squeezed into 32x48." in caplog.text
    assert np.array_equal(found, expected(pipe, images=[[np.array(wide.resize((48, 32)))]]))


def test_progress(models: Path) -> None:
    """The bar is given the steps, is shown before the first, and is used up after the last."""
    pipe, seen = pipeline(models, "t2v"), []

    def bar(steps: Any) -> Any:
        for step in steps:
            seen.append(step)
            yield step
        seen.append("closed")

    pipe("a", **{**SHORT, "progress_bar_cmd": bar})
    assert seen == [0, 1, "closed"]


def test_lora(models: Path, tmp_path: Path) -> None:
    """Several are added to the weights of the release, and each sum is rounded once."""
    pipe = pipeline(models, "t2v")
    source = torch.Generator().manual_seed(2)
    files = []
    for number in range(2):
        update = Update(torch.randn(4, 32, generator=source), torch.randn(32, 4, generator=source), 8.0)
        files.append(tmp_path / f"{number}.safetensors")
        write_adapter(files[-1], Adapter({"blocks.0.self_attn.q": update}), "comfyui" if number else "peft")
    before = pipe.dit.get_parameter("blocks.0.self_attn.k.weight").clone()
    pipe.load_lora(pipe.dit, files[0], alpha=0.5)
    pipe.load_lora(pipe.dit, files[1])
    once = mm.load_model(models / COMMON, dtype="fp32", device="cpu", adapters=[(files[0], 0.5), files[1]])
    for name, value in pipe.dit.named_parameters():
        assert torch.equal(value, once.get_parameter(name)), name
    assert torch.equal(before, pipe.dit.get_parameter("blocks.0.self_attn.k.weight"))
    with pytest.raises(MMError, match="CFG-408"):
        pipe.load_lora(pipe.text_encoder, files[0])  # type: ignore[arg-type]
    other = Adapter({"blocks.0.self_attn.q": Update(torch.zeros(4, 64), torch.zeros(64, 4), 4.0)})
    write_adapter(tmp_path / "other.safetensors", other, "peft")
    with pytest.raises(MMError, match="DATA-093"):
        pipe.load_lora(pipe.dit, tmp_path / "other.safetensors")


@pytest.mark.parametrize("fp8", [False, True])
def test_a_lora_that_is_refused_changes_nothing(models: Path, tmp_path: Path, *, fp8: bool) -> None:
    """The first linear can have its update and the last one cannot: neither has, and others can be added."""
    waits = {"offload_dtype": torch.float8_e4m3fn} if fp8 else {}
    given = [ModelConfig(model_id=COMMON, origin_file_pattern=WEIGHTS, **waits), *configs(COMMON)[1:]]  # type: ignore[arg-type]
    pipe = WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", model_configs=given, local_model_path=models, skip_download=True
    )
    sound, large = (Update(torch.ones(4, 32), torch.full((32, 4), value), 4.0) for value in (1e-3, 1.0))
    before = {name: value.clone() for name, value in pipe.dit.named_parameters()}
    file = tmp_path / "both.safetensors"
    write_adapter(file, Adapter({"blocks.0.self_attn.q": sound, "blocks.1.self_attn.o": large}), "peft")
    for alpha, said in ((1e38, r"CKPT-016: blocks.1.self_attn.o"), (math.nan, "CFG-446"), ("1", "CFG-446")):
        with pytest.raises(MMError, match=said):
            pipe.load_lora(pipe.dit, file, alpha=alpha)  # type: ignore[arg-type]
        after = dict(pipe.dit.named_parameters())
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    write_adapter(tmp_path / "sound.safetensors", Adapter({"blocks.0.self_attn.q": sound}), "peft")
    pipe.load_lora(pipe.dit, tmp_path / "sound.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in pipe.dit.named_parameters())


def test_files_of_others_are_taken_where_a_release_lacks_them(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pipeline(models, "fun_control_ref")
    assert f"{VAE_FILE} of {MODELS['fun_control_ref']}: taking {models / COMMON / VAE_FILE}" in caplog.text
    with pytest.raises(MMError, match="CFG-401") as raised:
        find_parts(
            configs(MODELS["fun_control"]), ModelConfig(path=models), models, may_download=False, shared=False
        )  # fmt: skip
    assert len(raised.value.problems) == 2  # the encoders of text and of videos, at once


def refusal(models: Path, given: list[ModelConfig]) -> str:
    with pytest.raises(MMError) as raised:
        WanVideoPipeline.from_pretrained(device="cpu", model_configs=given, local_model_path=models, skip_download=True)
    return "\n".join(map(str, raised.value.problems))


def test_models_that_cannot_be_used_are_named_at_once(models: Path) -> None:
    wrong = [
        ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.4B", origin_file_pattern=WEIGHTS),
        ModelConfig(model_id=COMMON, origin_file_pattern="models_t6*.pth"),
        ModelConfig(path=models / "nothing.safetensors"),
        ModelConfig(model_id=COMMON),
    ]
    said = refusal(models, wrong)
    assert said.count("\n") == 3
    assert "CFG-400: The model Wan-AI/Wan2.1-T2V-1.4B is not in" in said and f"there is {COMMON}" in said
    assert "CFG-401: Nothing in" in said and "matches models_t6*.pth" in said
    assert said.count("CFG-403") == 2


def test_what_no_model_config_can_say_is_told_at_once(models: Path) -> None:
    weights = models / COMMON / "diffusion_pytorch_model.safetensors"
    waits = ModelConfig(path=weights, offload_device="disk", offload_dtype=torch.int8)
    with pytest.raises(MMError) as raised:
        WanVideoPipeline.from_pretrained(device="gpu", model_configs=[waits, "vae.pth"], tokenizer_config=None)  # type: ignore[arg-type, list-item]
    said = [problem.message for problem in raised.value.problems]
    assert [problem.id for problem in raised.value.problems] == ["CFG-446"] * 5
    for word, line in zip(("'gpu'", "'disk'", "torch.int8", "'vae.pth'", "None"), said, strict=True):
        assert word in line


def test_a_video_that_cannot_be_is_refused_before_it_is_written(tmp_path: Path) -> None:
    size = (32, 34)
    for frames, name, more, named in (
        ([], "a.mp4", {}, ["holds none"]),
        ([Image.new("RGB", size), Image.new("RGB", (16, 16))], "a.gif", {"fps": 0}, ["fps", ".gif", "2 sizes"]),
        ([Image.new("RGB", (33, 31))], "a.mp4", {"quality": 11}, ["quality", "31x33"]),
    ):
        with pytest.raises(MMError) as raised:
            mm.save_video(frames, tmp_path / name, **more)  # type: ignore[arg-type]
        said = [problem.message for problem in raised.value.problems]
        assert len(said) == len(named) and all(word in line for word, line in zip(named, said, strict=True))
    assert not list(tmp_path.iterdir())
    mm.save_video([Image.new("RGB", size)] * 3, tmp_path / "ntsc.mp4", fps=29.97)
    with av.open(str(tmp_path / "ntsc.mp4")) as file:
        assert float(file.streams.video[0].average_rate or 0) == pytest.approx(29.97, rel=1e-5)


def test_what_is_lacking_or_there_twice_is_named(models: Path, tmp_path: Path) -> None:
    named = [models / COMMON, models / COMMON, models / MODELS["i2v"]]  # no two experts
    said = refusal(models, [ModelConfig(path=path) for path in named[:2]])
    assert "CFG-404: Several models are a dit" in said
    said = refusal(models, [ModelConfig(path=path) for path in named])
    assert "CFG-404: Several models are a dit" in said and "names no vae" in said and "names no text_encoder" in said
    lora = tmp_path / "lora.safetensors"
    write_adapter(lora, Adapter({"blocks.0.self_attn.q": Update(torch.zeros(4, 32), torch.zeros(32, 4), 4.0)}), "peft")
    said = refusal(models, [*configs(COMMON), ModelConfig(path=lora)])
    assert f"CFG-404: {lora} holds adapters weights. Fix: Name a transformer" in said
    whole = tmp_path / "whole"
    (whole / "transformer").mkdir(parents=True)
    said = refusal(models, [*configs(COMMON), ModelConfig(path=whole)])
    assert f"CFG-404: {whole} holds no known weights. Fix: Name the models in it one by one: {whole}/transf" in said
    shards = sorted((models / MODELS["fun_control"]).glob(WEIGHTS))
    with pytest.raises(MMError, match=r"DATA-024.*lacks 1 of 3 shards"):
        find_parts(
            [ModelConfig(path=shards[:2]), *configs(COMMON)[1:]], ModelConfig(path=models), models, may_download=False,
            shared=True,
        )  # fmt: skip


def test_parameters_that_a_model_does_not_take_are_named_at_once(models: Path) -> None:
    pipe = pipeline(models, "t2v")
    wrong = {"control_video": video(1), "motion_bucket_id": 3, "sigma_shfit": 5, "rand_device": "cuda"}
    with pytest.raises(MMError) as raised:
        pipe("a", **wrong, **SHORT)
    said = "\n".join(map(str, raised.value.problems))
    assert said.count("\n") == 3
    assert (
        "CFG-405: rand_device is cuda" in said
        and "CFG-406: There is no parameter sigma_shfit. Fix: Use sigma_shift." in said
    )
    assert (
        "control_video is given, and T2V models do not take it. Fix: Leave it out, or use a model of Fun-Control, "
        in said
    )
    assert (
        "motion_bucket_id is given, and T2V models do not take it. Fix: Leave it out, or use a model of SpeedControl."
        in said
    )
    with pytest.raises(MMError, match=r"DATA-087.*has 3 frames, and 5 are asked for"):
        pipe("a", input_video=video(1)[:3], denoising_strength=0.5, **SHORT)


def test_values_that_a_parameter_cannot_have_are_told_at_once(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the pipeline's words, with parameters that the model does not take; the log names what changes nothing."""
    pipe = pipeline(models, "t2v")
    wrong: dict[str, Any] = {
        "seed": 2**64, "num_frames": 5.0, "height": -16, "width": "48", "cfg_scale": "5", "num_inference_steps": 0,
        "sigma_shift": 0, "tile_size": 2, "tile_stride": (0, 1), "input_video": "clip.mp4", "denoising_strength": 0,
        "tea_cache_l1_thresh": 0, "sliding_window_size": 0, "tiled": "yes", "negative_prompt": None,
    }  # fmt: skip
    with pytest.raises(MMError) as raised:
        pipe(["a", "b"], **wrong, vace_scale=2)  # type: ignore[arg-type]
    named = [(problem.id, problem.message.split()[0]) for problem in raised.value.problems]
    assert sorted(named) == sorted([("CFG-407", "vace_scale"), *(("CFG-446", name) for name in ("prompt", *wrong))])
    together = {"sliding_window_size": 2, "sliding_window_stride": 3, "tea_cache_l1_thresh": 0.1, "tiled": True}
    with pytest.raises(MMError) as raised:
        pipe("a", **{**SHORT, **together}, tile_size=(2, 2), tile_stride=[3, 1])
    assert [problem.id for problem in raised.value.problems] == ["CFG-322", "CFG-321", "CFG-446", "CFG-446"]
    limits: list[dict[str, Any]] = [{"vram_limit": "6"}, {"vram_limit": math.nan}, {"num_persistent_param_in_dit": -1}]
    for limit in limits:
        with pytest.raises(MMError, match=f"CFG-446: {next(iter(limit))} is"):
            pipe.enable_vram_management(**limit)
    caplog.clear()
    clip = {**SHORT, "cfg_scale": 1.0, "negative_prompt": "blurry", "seed": -(2**63)}
    pipe("a", **clip, camera_control_speed=0.5, tile_size=(1, 1))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "camera_control_speed changes nothing without camera_control_direction.",
        "tile_size changes nothing without tiled=True.",
        "negative_prompt changes nothing with cfg_scale 1.",
    ]


def test_all_steps_of_a_video_s_clip_are_taken_at_any_strength(models: Path) -> None:
    """As in DiffSynth-Studio, whose grid begins at the strength: 2 steps at 0.3 are two."""
    steps: list[int] = []

    def noted(bar: Iterable[int]) -> Iterator[int]:
        for step in bar:
            steps.append(step)
            yield step

    clip = {**SHORT, "progress_bar_cmd": noted}
    assert len(pipeline(models, "t2v")("a", input_video=video(1), denoising_strength=0.3, **clip)) == 5
    assert steps == [0, 1]


def test_a_hub_that_cannot_be_reached_is_said(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on the port: the answer is one line, and says where to put the files."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    given = [ModelConfig(model_id="PAI/Wan2.1-Fun-14B-InP", origin_file_pattern=WEIGHTS)]
    with pytest.raises(
        MMError, match=r"CFG-402: alibaba-pai/Wan2.1-Fun-14B-InP cannot be fetched from http://127.0.0.1:9"
    ):
        WanVideoPipeline.from_pretrained(device="cpu", model_configs=given, local_model_path=models)


PEERS_MD5 = {"Wan2.1 T2V 14B": "aafcfd9672c3a2456dc46e1cb6e52c70"}
"""Of keys and shapes, from DiffSynth-Studio's table."""


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_are_known_by_their_headers(name: str, models: Path, tmp_path: Path) -> None:
    """Shards of the released sizes that hold no values: whoever read any would read holes of 28 GB."""
    wan = PUBLISHED[name]
    shapes = whole_shapes(wan)
    if name in PEERS_MD5:
        assert key_shape_md5(shapes) == PEERS_MD5[name]
    names, count = list(shapes), 6 if wan.num_layers > 30 else 1
    for index in range(count):
        mine = names[index::count]
        file = (
            f"diffusion_pytorch_model-{index + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        )
        _write_holes(tmp_path / file, {name: shapes[name] for name in mine})
    given = [ModelConfig(path=sorted(tmp_path.glob("*.safetensors"))), *configs(COMMON)[1:]]
    start = time.process_time()
    parts = find_parts(given, ModelConfig(path=models), models, may_download=False, shared=True)
    found = parts.transformers[0].config()
    assert time.process_time() - start < 1  # of the processor, as the tests beside this one take its time
    assert found is not None and found.differing_fields(wan) in ([], ["model_type"])


def _write_holes(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with file.open("wb") as writer:
        writer.write(struct.pack("<Q", len(text)) + text)
        writer.truncate(8 + len(text) + position)
