"""What a user can get wrong, at the level of the commands: one line with an id and a remedy, the right exit code,
nothing half-written."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_content import as_files

from mm.cli.entry import run

MODEL = "weights/Wan2.1-T2V-Tiny-Diffusers"


class Workplace:
    """A private copy of the embedded default that a test may damage."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.configs = home / "configs"
        self.out = home / "out"
        tools = json.loads((self.configs / "tools.json").read_text())
        original = str(Path(tools["sorafeature"]["save_path"]).parent)
        for path in filter(Path.is_file, self.configs.rglob("*")):  # the files hold absolute paths
            path.write_text(path.read_text().replace(original, str(home)))

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        """Rewrite a json file below the home; `change` works in place or returns the new content."""
        path = self.home / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))

    def words(self, command: str) -> list[str]:
        file = self.configs
        return {
            "extract": ["--mm-data", f"{file}/data.json", "--mm-model", f"{file}/model_wan.json",
                        "--mm-tool", f"{file}/tools.json", "--num-workers", "1"],
            "train": ["--mm-data", f"{file}/feature_data.json", "--mm-model", f"{file}/pretrain_model.json",
                      "--load", f"{self.home / MODEL}/transformer", "--save", str(self.out), "--train-iters", "1",
                      "--lr", "1e-3", "--num-workers", "0", "--no-progress-bar"],
            "generate": ["--mm-model", f"{file}/inference_model.json", "--save-path", str(self.out),
                         "--num-inference-steps", "2", "--no-progress-bar"],
            "convert": ["--mode", "convert_to_mm", "--source_path", f"{self.home / MODEL}/transformer",
                        "--target_path", str(self.out)],
        }[command]  # fmt: skip


@pytest.fixture
def place(demo: Path, tmp_path: Path) -> Workplace:
    return Workplace(Path(shutil.copytree(demo, tmp_path / "home")))


def videos(place: Workplace) -> list[Path]:
    shutil.rmtree(place.home / "features")
    return sorted((place.home / "dataset" / "videos").iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_video(place: Workplace) -> None:
    videos(place)[3].unlink()


def truncated_video(place: Workplace) -> None:
    truncate(videos(place)[3])


def short_video(place: Workplace) -> None:
    videos(place)
    place.edit("configs/data.json", lambda c: c["dataset_param"]["preprocess_parameters"].update(num_frames=13))


def no_caption(place: Workplace) -> None:
    videos(place)
    place.edit("dataset/data.json", lambda rows: rows[5].pop("cap") and None)


def other_recipe(place: Workplace) -> None:
    place.edit("configs/data.json", lambda c: c["dataset_param"]["preprocess_parameters"].update(max_height=48))


def bad_frames(place: Workplace) -> None:
    place.edit("configs/data.json", lambda c: c["dataset_param"]["preprocess_parameters"].update(num_frames=10))


def bad_size(place: Workplace) -> None:
    place.edit("configs/data.json", lambda c: c["dataset_param"]["preprocess_parameters"].update(max_width=60))


def unknown_key(name: str) -> Callable[[Workplace], None]:
    return lambda place: place.edit(f"configs/{name}", lambda c: c.update(tsak="t2v"))


def broken_vae(place: Workplace) -> None:
    videos(place)
    truncate(place.home / MODEL / "vae" / "diffusion_pytorch_model.safetensors")


def weights_without_a_key(place: Workplace) -> None:
    from safetensors.torch import load_file, save_file

    file = place.home / MODEL / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["blocks.2.attn1.to_q.bias"]
    save_file(tensors, file)


def truncated_weights(place: Workplace) -> None:
    truncate(place.home / MODEL / "transformer" / "diffusion_pytorch_model.safetensors")


def bad_heads(place: Workplace) -> None:
    place.edit("configs/pretrain_model.json", lambda c: c["predictor"].update(num_heads=7))


def missing_feature(place: Workplace) -> None:
    next((as_files(place.home / "features") / "features").glob("0004*")).unlink()


def damaged_feature(place: Workplace) -> None:
    for path in (as_files(place.home / "features") / "features").glob("0*"):
        truncate(path)


def clips_exist(place: Workplace) -> None:
    place.out.mkdir()
    (place.out / "video_0000.mp4").write_bytes(b"precious")


def target_exists(place: Workplace) -> None:
    (place.out / "release").mkdir(parents=True)
    (place.out / "release" / "keep").write_text("precious")


def empty_prompts(place: Workplace) -> None:
    (place.home / "prompts.txt").write_text("\n\n")


def images_model(place: Workplace) -> None:
    shutil.copy(place.configs / "i2v" / "pretrain_model.json", place.configs / "pretrain_model.json")


def task_of_another_model(place: Workplace) -> None:
    place.edit("configs/pretrain_model.json", lambda c: c.update(task="flf2v"))


def channels_of_another_task(place: Workplace) -> None:
    place.edit("configs/pretrain_model.json", lambda c: c["predictor"].update(in_dim=36))


def weights_of_another_task(place: Workplace) -> None:
    shutil.rmtree(place.home / MODEL / "transformer")
    images = place.home / "weights" / "Wan2.1-I2V-Tiny-Diffusers" / "transformer"
    shutil.copytree(images, place.home / MODEL / "transformer")


def two_tasks(place: Workplace) -> None:
    place.edit("configs/tools.json", lambda c: c.update(task="i2v"))


def images(place: Workplace, task: str = "i2v") -> None:
    """Extraction of `task` in place of t2v, into a store of its own, which another test may have filled already."""
    shutil.rmtree(place.home / f"features_{task}", ignore_errors=True)
    for path in (place.configs / task).iterdir():
        shutil.copy(path, place.configs)


def images_into_another_store(place: Workplace) -> None:
    images(place)
    place.edit("configs/tools.json", lambda c: c["sorafeature"].update(save_path=str(place.home / "features")))


def no_image_encoder(place: Workplace) -> None:
    images(place)
    place.edit("configs/model_wan.json", lambda c: c["ae"].pop("i2v_processor") and None)


def wrong_image_encoder(place: Workplace) -> None:
    images(place)
    shutil.rmtree(place.home / "weights" / "Wan2.1-I2V-Tiny-Diffusers" / "image_encoder")


def one_frame(place: Workplace) -> None:
    images(place, "flf2v")
    place.edit("configs/data.json", lambda c: c["dataset_param"]["preprocess_parameters"].update(num_frames=1))


def short_video_of_images(place: Workplace) -> None:
    images(place, "flf2v")
    place.edit("dataset/data.json", lambda rows: rows[2].update(cut=[3, 7]))
    place.edit("configs/data.json", lambda c: c["dataset_param"]["preprocess_parameters"].update(min_num_frames=5))


CASES: list[tuple[str, Callable[[Workplace], None], list[str], str, int]] = [
    ("extract", no_video, [], "DATA-001", 65),
    ("extract", truncated_video, [], "DATA-002", 65),
    ("extract", short_video, [], "DATA-004", 65),
    ("extract", no_caption, [], "DATA-062", 65),
    ("extract", other_recipe, [], "DATA-014", 65),
    ("extract", bad_frames, [], "CFG-050", 64),
    ("extract", bad_size, [], "CFG-051", 64),
    ("extract", broken_vae, [], "DATA-042", 65),
    ("extract", unknown_key("data.json"), [], "CFG-003", 64),
    ("extract", unknown_key("model_wan.json"), [], "CFG-003", 64),
    ("extract", unknown_key("tools.json"), [], "CFG-003", 64),
    ("extract", two_tasks, [], "CFG-070", 64),
    ("extract", no_image_encoder, [], "CFG-074", 64),
    ("extract", one_frame, [], "CFG-075", 64),
    ("extract", short_video_of_images, [], "DATA-004", 65),
    ("extract", wrong_image_encoder, [], "DATA-040", 65),
    ("extract", images_into_another_store, [], "DATA-014", 65),
    ("train", images_model, [], "DATA-046", 65),
    ("train", task_of_another_model, [], "CFG-070", 64),
    ("train", channels_of_another_task, [], "CFG-005", 64),
    ("train", weights_of_another_task, [], "CFG-028", 64),
    ("train", unknown_key("feature_data.json"), [], "CFG-003", 64),
    ("train", unknown_key("pretrain_model.json"), [], "CFG-003", 64),
    ("train", bad_heads, [], "CFG-005", 64),
    ("train", weights_without_a_key, [], "CKPT-011", 74),
    ("train", truncated_weights, [], "DATA-022", 65),
    ("train", missing_feature, [], "DATA-011", 65),
    ("train", damaged_feature, [], "DATA-011", 65),
    ("generate", unknown_key("inference_model.json"), [], "CFG-003", 64),
    ("generate", weights_without_a_key, [], "CKPT-011", 74),
    ("generate", clips_exist, [], "DATA-050", 65),
    ("generate", empty_prompts, [], "DATA-054", 65),
    ("generate", lambda place: None, ["--input-size", "10", "64", "64"], "CFG-060", 64),
    ("generate", lambda place: None, ["--input-size", "9", "60", "64"], "CFG-061", 64),
    ("convert", target_exists, [], "CKPT-020", 74),
    ("convert", truncated_weights, [], "DATA-022", 65),
    ("convert", lambda place: None, ["--mode", "convert_to_gguf"], "CFG-071", 64),
]


def names(case: tuple[Any, ...]) -> str:
    return f"{case[0]}-{getattr(case[1], '__name__', '')}-{case[3]}"


@pytest.mark.parametrize("case", CASES, ids=names)
def test_one_line_an_id_a_remedy_and_nothing_half_written(
    place: Workplace, capsys: pytest.CaptureFixture[str], case: tuple[Any, ...]
) -> None:
    command, damage, more, expected, exit_code = case
    damage(place)
    before = everything(place.home)
    module = importlib.import_module(f"mm.cli.{command}")
    assert run(module.main, [*place.words(command), *more]) == exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error ")]
    assert lines, "no error line"
    assert all(line.startswith(f"error {expected}: ") and " Fix: " in line for line in lines), lines
    after = everything(place.home)
    assert {path: after.get(path) for path in before} == before, "something that was there changed"
    new = sorted(after.keys() - before.keys())
    complete = (
        "features/plan/",
        "features/shards/",
        "features/work/",
        "features_flf2v/",
        "features/recipe.json",
        "out/.lock",
        "out/metrics.jsonl",
        "out/run.yaml",
        "out/tensorboard/",
    )
    assert all(path.startswith(complete) for path in new), new
    assert not any(".tmp" in path for path in new), new
    assert "features/manifest.json" not in new


def everything(home: Path) -> dict[str, int]:
    return {str(p.relative_to(home)): hash(p.read_bytes()) for p in home.rglob("*") if p.is_file()}


def test_the_executable_leaves_with_the_code(tmp_path: Path) -> None:
    executable = Path(sys.executable).with_name("mm")
    done = subprocess.run([executable, "tarin"], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert done.stderr.startswith('error CFG-009: "tarin" is not a command.')
    done = subprocess.run([executable, "plot", "--run", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 74
    assert "CKPT-070" in done.stderr
