"""The Python API gives what the commands give, bit for bit, and needs no process group."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from extracted import extract
from kept_frames import keeping_frames
from PIL import Image
from safetensors.torch import load_file
from store_content import stored
from train.training_runs import WEIGHTS, bits, metrics, run

import mm
import mm.api
import mm.generate.run
from mm.api.arguments import as_pixels
from mm.cli.generate import main as generate_command
from mm.config.tasks.registry import TASKS
from mm.data.video import probe, read_frames
from mm.demo.components import MODEL_NAMES, encoders_of
from mm.demo.configs import text_len
from mm.errors import MMError
from mm.wan.encoders import TextEncoder, VideoEncoder
from mm.wan.model import WanModel

SIZE = (9, 64, 64)
CPU = torch.device("cpu")


@pytest.fixture
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes a process group fails."""

    def refuse(*words: Any, **more: Any) -> None:
        raise AssertionError("a process group is made")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)


@pytest.fixture(scope="module")
def stores(demo_of_images: Path) -> Path:
    """The embedded default with the features of every task."""
    for task in ("speedcontrol", "fun_control"):
        extract(demo_of_images / "configs" / task)
    return demo_of_images


def folder_of(demo: Path, task: str) -> Path:
    return demo / "weights" / MODEL_NAMES[task]


def encoders(demo: Path, task: str = "t2v") -> mm.Encoders:
    return mm.Encoders.of(folder_of(demo, encoders_of(TASKS[task]).name), text_dtype="fp32")


def rows_of(demo: Path, task: str, count: int) -> list[dict[str, Any]]:
    name = f"data_{task}.json" if TASKS[task].columns or TASKS[task].media else "data.json"
    rows: list[dict[str, Any]] = json.loads((demo / "dataset" / name).read_text())
    return rows[:count]


def media_of(demo: Path, row: dict[str, Any], task: str) -> dict[str, Path]:
    return {media.name: demo / "dataset" / row[media.name] for media in TASKS[task].media if media.name in row}


def columns_of(row: dict[str, Any], task: str) -> dict[str, float]:
    return {column.name: row[column.name] for column in TASKS[task].columns}


def lines(path: Path, count: int) -> list[str]:
    return path.read_text().splitlines()[:count]


def test_mm_hands_on_the_api() -> None:
    assert sorted(mm.__all__) == sorted(mm.api.__all__)
    for name in mm.__all__:
        assert getattr(mm, name) is getattr(mm.api, name)
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        mm.load_modle  # noqa: B018


# --- weights


def inputs(model: WanModel) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(1, 16, 3, 8, 8, generator=source),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(1, 32, model.config.text_dim, generator=source),
    }


def test_a_loaded_model_is_that_of_diffusers(demo: Path, no_process_group: None) -> None:
    model = mm.load_model(demo / WEIGHTS, dtype="fp32", device="cpu")
    reference = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(demo / WEIGHTS))
    reference.load_state_dict(load_file(demo / WEIGHTS / "diffusion_pytorch_model.safetensors"))
    given = inputs(model)
    found = model.velocity(**given)
    with torch.no_grad():
        expected = reference.eval()(given["latents"], given["timestep"], given["text"], return_dict=False)[0]
    assert not found.requires_grad
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("to", ["native", "mm", "hf"])
def test_weights_of_every_format_are_one_model(demo: Path, tmp_path: Path, no_process_group: None, to: Any) -> None:
    written = mm.convert_weights(demo / WEIGHTS, tmp_path / "new", to)
    assert written.files == tuple(
        sorted(str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file())
    )
    assert mm.inspect_weights(written.path).num_tensors == mm.inspect_weights(demo / WEIGHTS).num_tensors > 0
    ours, theirs = (mm.load_model(path, dtype="fp32", device="cpu") for path in (written.path, demo / WEIGHTS))
    given = inputs(ours)
    assert torch.equal(ours.velocity(**given), theirs.velocity(**given))


def test_an_adapter_counts_by_its_strength(demo: Path, tmp_path: Path, no_process_group: None) -> None:
    from mm.lora.adapter import Adapter, Update
    from mm.lora.files import write_adapter

    source, name = torch.Generator().manual_seed(0), "blocks.0.self_attn.q"
    base = mm.load_model(demo / WEIGHTS, dtype="fp32", device="cpu")
    width = base.config.hidden_size
    down, up = torch.randn(2, width, generator=source), torch.randn(width, 2, generator=source)
    write_adapter(tmp_path / "a.safetensors", Adapter({name: Update(down, up, 2.0)}, {}), "peft")
    adapted = mm.load_model(demo / WEIGHTS, dtype="fp32", device="cpu", adapters=[(tmp_path / "a.safetensors", 0.5)])
    expected = base.get_parameter(f"{name}.weight") + 0.5 * up @ down
    torch.testing.assert_close(adapted.get_parameter(f"{name}.weight"), expected, rtol=0, atol=1e-6)


# --- features


@pytest.mark.parametrize("task", ["flf2v", "fun_control", "i2v", "speedcontrol", "t2v"])
def test_features_are_those_of_the_command(stores: Path, no_process_group: None, task: str) -> None:
    rows = rows_of(stores, task, 2)
    videos = [stores / "dataset" / row["path"] for row in rows]
    info = probe(videos[1])
    in_memory = torch.cat(list(read_frames(videos[1], info, range(info.num_frames)))).permute(0, 2, 3, 1)
    given = [
        mm.VideoRow(videos[0], rows[0]["cap"], columns_of(rows[0], task), media_of(stores, rows[0], task)),
        mm.VideoRow(in_memory.numpy(), rows[1]["cap"], columns_of(rows[1], task), media_of(stores, rows[1], task)),
    ]
    found = mm.extract_features(
        given, encoders(stores, task), task=task, size=SIZE, max_text_tokens=text_len(TASKS[task]), device="cpu"
    )
    store = stores / ("features" if task == "t2v" else f"features_{task}")
    for row, feature in zip(rows, found, strict=True):
        of_command = stored(store)[row["path"]]
        named = {"latents": feature.latents, "prompt": feature.prompt, **feature.features}
        assert of_command.keys() - {"prompt_mask"} == named.keys()
        for name, value in named.items():
            assert value is not None and torch.equal(value, of_command[name]), name


def test_media_that_cannot_be(stores: Path) -> None:
    video, loaded = stores / "dataset" / rows_of(stores, "t2v", 1)[0]["path"], encoders(stores, "i2v")
    with pytest.raises(MMError, match=r"(?s)DATA-245: Row 0 names no file of the role control.*DATA-245: Row 1"):
        mm.extract_features([(video, "x"), (video, "y")], loaded, task="fun_control", size=SIZE, device="cpu")
    row = mm.VideoRow(video, "x", media={"depth": video})
    with pytest.raises(MMError, match=r"CFG-200.*'depth'.*it takes control, first_frame"):
        mm.extract_features([row], loaded, task="fun_control", size=SIZE, device="cpu")


def test_a_clip_of_a_longer_video_in_memory(demo: Path, no_process_group: None) -> None:
    """The frames that the features were made of are there, in a row, from where `start_frame` says."""
    frames = torch.randint(256, (30, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    loaded = encoders(demo)
    [feature] = mm.extract_features([(frames, "noise")], loaded, size=SIZE, device="cpu")
    begin = feature.start_frame
    pixels = frames[begin : begin + SIZE[0]].permute(3, 0, 1, 2).float() / 127.5 - 1
    expected = loaded.load_vae(CPU).encode(pixels.unsqueeze(0))[0]
    assert feature.latents is not None and torch.equal(feature.latents, expected)
    with pytest.raises(MMError) as caught:
        mm.extract_features([(frames[:8], "too short")], loaded, size=SIZE, device="cpu")
    assert caught.value.id == "DATA-004"


# --- generation

STEPS = 2


def of_the_command(demo: Path, folder: Path, task: str, count: int, *words: str) -> list[Any]:
    """The frames of `mm generate`, as they were before the codec."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(lines(demo / "prompts.txt", count)))
    config = demo / "configs" / ("" if task == "t2v" else task) / "inference_model.json"
    with keeping_frames(mm.generate.run):
        generate_command(
            ["--mm-model", str(config), "--prompt", str(folder / "prompts.txt"), "--save-path", str(folder / "clips"),
             "--device", "cpu", "--no-progress-bar", "--num-inference-steps", str(STEPS), "--seed", "7", *words]
        )  # fmt: skip
    return [np.load(folder / "clips" / f"video_{index:04d}.npy") for index in range(count)]


def listed(demo: Path, folder: Path, name: str, count: int) -> str:
    """The first lines of one of the demo's lists, as a file."""
    path = folder / name
    path.write_text("\n".join(lines(demo / name, count)))
    return str(path)


def loaded(demo: Path, task: str = "t2v") -> WanModel:
    folder = folder_of(demo, task) / "transformer"
    return mm.load_model(folder, dtype="fp32", device="cpu", task=task, text_len=text_len(TASKS[task]))


def same(found: list[torch.Tensor], expected: list[Any]) -> bool:
    assert [frames.dtype for frames in found] == [torch.uint8] * len(expected)
    return all(np.array_equal(ours.numpy(), theirs) for ours, theirs in zip(found, expected, strict=True))


def test_videos_of_texts(demo: Path, tmp_path: Path) -> None:
    words = ["--guidance-scale", "3", "--negative-prompt", "a green circle", "--micro-batch-size", "2"]
    expected = of_the_command(demo, tmp_path / "of", "t2v", 3, *words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "init_process_group", None)
        found = mm.generate_videos(
            loaded(demo), lines(demo / "prompts.txt", 3), encoders(demo), size=SIZE, steps=STEPS,
            guidance_scale=3.0, negative_prompt="a green circle", batch_size=2, seed=7,
        )  # fmt: skip
    assert same(found, expected)
    assert not torch.distributed.is_initialized()


def test_videos_of_images(demo: Path, tmp_path: Path) -> None:
    """A file, one of Pillow's and an array are the same image."""
    words = ["--image", listed(demo, tmp_path, "images_i2v.txt", 3)]
    expected = of_the_command(demo, tmp_path / "of", "i2v", 3, *words)
    files = lines(demo / "images_i2v.txt", 3)
    images = [files[0], Image.open(files[1]), np.asarray(Image.open(files[2]))]
    found = mm.generate_videos(
        loaded(demo, "i2v"), lines(demo / "prompts.txt", 3), encoders(demo, "i2v"), images=images,
        size=SIZE, steps=STEPS, guidance_scale=1.0, seed=7,
    )  # fmt: skip
    assert same(found, expected)


def test_videos_between_two_images(demo: Path, tmp_path: Path) -> None:
    words = ["--image", listed(demo, tmp_path, "images_flf2v.txt", 1)]
    expected = of_the_command(demo, tmp_path / "of", "flf2v", 1, *words)
    pair = lines(demo / "images_flf2v.txt", 1)[0].split(", ")
    found = mm.generate_videos(
        loaded(demo, "flf2v"), lines(demo / "prompts.txt", 1), encoders(demo, "flf2v"), images=[pair],
        size=SIZE, steps=STEPS, guidance_scale=1.0, seed=7,
    )  # fmt: skip
    assert same(found, expected)


def test_videos_with_a_number(demo: Path, tmp_path: Path) -> None:
    words = ["--columns", f"motion_bucket_id={listed(demo, tmp_path, 'motion_bucket_id.txt', 2)}"]
    expected = of_the_command(demo, tmp_path / "of", "speedcontrol", 2, *words)
    numbers = [float(line) for line in lines(demo / "motion_bucket_id.txt", 2)]
    found = mm.generate_videos(
        loaded(demo, "speedcontrol"), lines(demo / "prompts.txt", 2), encoders(demo, "speedcontrol"),
        columns={"motion_bucket_id": numbers}, size=SIZE, steps=STEPS, guidance_scale=1.0, seed=7,
    )  # fmt: skip
    assert same(found, expected)


def test_videos_of_videos(demo: Path, tmp_path: Path) -> None:
    video = sorted((demo / "dataset/videos").glob("*.mp4"))[0]
    (tmp_path / "videos.txt").write_text(str(video))
    words = ["--video", str(tmp_path / "videos.txt"), "--strength", "0.6"]
    expected = of_the_command(demo, tmp_path / "of", "t2v", 1, *words)
    info = probe(video)
    in_memory = torch.cat(list(read_frames(video, info, range(info.num_frames)))).permute(0, 2, 3, 1)
    for given in (video, in_memory):
        found = mm.generate_videos(
            loaded(demo), lines(demo / "prompts.txt", 1)[0], encoders(demo), videos=[given], strength=0.6,
            size=SIZE, steps=STEPS, guidance_scale=1.0, seed=7,
        )  # fmt: skip
        assert same(found, expected)


def test_encoders_that_are_loaded_serve_again(demo: Path) -> None:
    folder = folder_of(demo, "t2v")
    ready = mm.Encoders(
        VideoEncoder.from_pretrained(folder / "vae", "fp32", CPU),
        TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer", "fp32", CPU, 32),
    )
    model = loaded(demo)
    one, two, of_folders = (
        mm.generate_videos(model, "a red circle moving left", given, size=SIZE, steps=STEPS, guidance_scale=1.0)
        for given in (ready, ready, encoders(demo))
    )
    assert torch.equal(one[0], two[0]) and torch.equal(one[0], of_folders[0])


def test_a_folder_is_a_model_with_its_encoders(demo: Path) -> None:
    folder = folder_of(demo, "t2v")
    model = mm.load_model(folder / "transformer", device="cpu")
    assert model.get_parameter("blocks.0.ffn.0.weight").dtype == torch.bfloat16
    one, other = (
        mm.generate_videos(*words, size=SIZE, steps=1, negative_prompt="")
        for words in ((folder, "a red circle"), (model, ["a red circle"], mm.Encoders.of(folder)))
    )
    assert torch.equal(one[0], other[0])


def refused(*words: Any, **more: Any) -> list[str]:
    with pytest.raises(MMError) as caught:
        mm.generate_videos(*words, **more)
    return sorted(problem.id for problem in caught.value.problems)


def test_arguments_that_cannot_be_meant(demo: Path) -> None:
    """All at once, before any encoder is loaded."""
    text, image = loaded(demo), loaded(demo, "i2v")
    nowhere = mm.Encoders.of("nowhere")
    wrong: dict[str, Any] = {"size": (8, 64, 60), "steps": 0, "strength": 0.5, "images": [["a.png"]]}
    assert refused(text, ["a", "b"], nowhere, **wrong) == [
        *("CFG-060", "CFG-061", "CFG-120", "CFG-121"),
        *("CFG-200", "CFG-200"),  # no steps; two prompts and the images of one
    ]
    assert refused(image, "a", nowhere, size=SIZE) == ["CFG-120"]
    assert refused(image, "a", nowhere, size=SIZE, images=["a.png"], videos=["v.mp4"]) == ["CFG-121"]
    assert refused(loaded(demo, "speedcontrol"), "a", nowhere, size=SIZE, columns={"motion_bucket_id": [101]}) == [
        "CFG-120"
    ]
    assert refused(text, "a") == ["CFG-200"]
    with pytest.raises(MMError, match=r"CFG-200.*expected uint8"):
        as_pixels(np.zeros((4, 4, 3)), "An image", 3)
    with pytest.raises(MMError, match="CFG-201"):
        mm.load_model(demo / WEIGHTS, task="i2v", device="cpu")
    with pytest.raises(MMError, match=r"CFG-200.*no effect"):
        mm.convert_weights(demo / WEIGHTS, "x", "native", like=demo / WEIGHTS)


# --- training


def test_training_is_that_of_the_command(demo: Path, tmp_path: Path) -> None:
    """Twice in a process, from run.yaml and from sections; what it leaves is a model."""
    expected = run(demo, tmp_path / "of", train_iters=3)
    file = tmp_path / "of" / "run.yaml"
    for name in ("one", "two"):
        found = mm.train_model(file, {"checkpoint.save": str(tmp_path / name)})
        assert [(step.loss_hex, step.grad_norm_hex, step.lr) for step in found.steps] == [
            (row["loss_hex"], row["grad_norm_hex"], row["lr"]) for row in expected
        ]
        assert bits(metrics(tmp_path / name)) == bits(expected)
        assert found.progress.step == 3 and not torch.distributed.is_initialized()
    assert found.checkpoint is not None and found.checkpoint.parent == tmp_path / "two"
    given = inputs(mm.load_model(found.checkpoint, dtype="fp32", device="cpu"))
    ours, theirs = (
        mm.load_model(tmp_path / name, dtype="fp32", device="cpu").velocity(**given) for name in ("two", "of")
    )
    assert torch.equal(ours, theirs)
    again = mm.train_model(file, {"checkpoint.save": str(tmp_path / "one")})
    assert again.steps == () and again.progress.step == 3


def test_training_without_a_folder(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(demo, tmp_path / "of", train_iters=2)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = mm.train_model(tmp_path / "of" / "run.yaml", {"checkpoint.save": None})
    assert [step.loss_hex for step in found.steps] == [row["loss_hex"] for row in expected]
    assert found.checkpoint is None and list(Path().iterdir()) == []


def test_training_that_cannot_be(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path / "of", train_iters=1)
    file, untouched = tmp_path / "of" / "run.yaml", {"checkpoint.save": str(tmp_path / "new")}
    clips = {"interval": 1, "prompts": "p.txt", "config": "c.json"}
    for changes, ids in (
        ({"training.stepz": 3, "trainings.steps": 3}, ["CFG-003", "CFG-003"]),
        ({"training.steps": 0, "optimizer.lr": "fast"}, ["CFG-005", "CFG-005"]),
        ({"validation": clips}, ["CFG-200"]),
        ({"checkpoint.load": None}, ["CFG-023"]),
    ):
        with pytest.raises(MMError) as caught:
            mm.train_model(file, {**untouched, **changes})
        assert [problem.id for problem in caught.value.problems] == ids
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(MMError, match="CFG-202"):
            mm.train_model(file, untouched)
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "new").exists()
