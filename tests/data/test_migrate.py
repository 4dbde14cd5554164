import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stores import MODEL, feature_set
from test_image_features import with_images

from mm.cli import migrate as migrate_command
from mm.config.data import DataSource
from mm.config.run.data import Clip
from mm.data.dataset import open_features
from mm.data.migrate import migrate
from mm.errors import DataError

MADE_WITH = Clip(num_frames=9, height=64, width=64)


def legacy(tokens: int = 3, **changes: Any) -> dict[str, Any]:
    """What MindSpeed-MM's extraction saves for one sample, in its later naming."""
    random = torch.Generator().manual_seed(tokens)
    mask = torch.zeros(1, 512, dtype=torch.int64)
    mask[:, :tokens] = 1
    values = {
        "video": torch.randn(16, 3, 8, 8, generator=random, dtype=torch.float32).bfloat16(),
        "prompt_ids": torch.randn(1, 512, 8, generator=random).bfloat16(),
        "prompt_mask": mask,
    }
    return {**values, **changes}


def images(last: bool = False) -> dict[str, torch.Tensor]:
    """What it saves beside them with images: features of CLIP; a mask, then the latents of the known frames."""
    random = torch.Generator().manual_seed(9)
    condition = torch.zeros(20, 3, 8, 8)
    condition[:4, 0] = 1
    if last:
        condition[3, -1] = 1
    condition[4:] = torch.randn(16, 3, 8, 8, generator=random)
    features = torch.randn(514 if last else 257, 4, generator=random)
    return {"i2v_clip_feature": features.bfloat16(), "i2v_vae_feature": condition.bfloat16()}


def write(folder: Path, items: list[Any], later: bool = True) -> DataSource:
    (folder / "features").mkdir(parents=True)
    rows = []
    for index, item in enumerate(items):
        torch.save(item, folder / "features" / f"{index}_mp4.pt")
        place = f"features/{index}_mp4.pt"
        rows.append(
            {"path": f"videos/{index}.mp4" if later else place, "cap": "x", "fps": 24, "sample_size": "9x64x64"}
        )
        if later:
            rows[-1]["file"] = place
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataSource(folder, folder / "data.jsonl")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "old", [legacy(3), legacy(7)])
    words = ["--source", tmp_path / "old", "--target", tmp_path / "new"]
    words += ["--num-frames", 9, "--max-height", 64, "--max-width", 64]
    migrate_command.main([str(word) for word in words])
    assert "2 samples" in capsys.readouterr().out
    assert len(open_features(feature_set(tmp_path / "new"), MODEL)) == 2


@pytest.mark.parametrize("later", [True, False])
def test_what_was_extracted_is_trained_on(later: bool, tmp_path: Path) -> None:
    items = [legacy(3), legacy(7)]
    if not later:
        items = [{{"video": "latents", "prompt_ids": "prompt"}.get(k, k): v for k, v in item.items()} for item in items]
    source = write(tmp_path / "old", items, later)
    assert migrate(source, tmp_path / "new", MADE_WITH, show_progress=False) == 2
    dataset = open_features(feature_set(tmp_path / "new"), MODEL)
    for index, (item, tokens) in enumerate(zip(items, (3, 7), strict=True)):
        found = dataset[index]
        assert torch.equal(found["latents"], item["video" if later else "latents"])
        assert torch.equal(found["prompt"], item["prompt_ids" if later else "prompt"][0, :tokens])
    with pytest.raises(DataError, match="DATA-068"):
        migrate(source, tmp_path / "new", MADE_WITH, show_progress=False)


@pytest.mark.parametrize(
    ("item", "id"),
    [
        ({"video": torch.zeros(1)}, "DATA-066"),
        ([1, 2], "DATA-066"),
        (legacy(i2v_clip_feature=torch.zeros(257, 1280)), "DATA-066"),
        (legacy(**images(), more=torch.zeros(1)), "DATA-066"),
        (legacy(**{**images(), "i2v_vae_feature": torch.zeros(20, 3, 8, 8)}), "DATA-066"),
        (legacy(**{**images(), "i2v_vae_feature": torch.ones(20, 3, 8, 8)}), "DATA-066"),
        (legacy(**{**images(), "i2v_vae_feature": torch.ones(20, 2, 8, 8)}), "DATA-066"),
        (
            legacy(video=torch.zeros(16, 1, 8, 8), **{**images(), "i2v_vae_feature": torch.ones(20, 1, 8, 8)}),
            "DATA-066",
        ),
        (legacy(**{**images(), "i2v_clip_feature": torch.zeros(2, 257, 4)}), "DATA-066"),
        (legacy(**{**images(), "i2v_clip_feature": torch.zeros(257, 4, dtype=torch.float64)}), "DATA-066"),
        (legacy(video=torch.zeros(1, 16, 3, 8, 8)), "DATA-066"),
        (legacy(video="x"), "DATA-066"),
        (legacy(video=torch.zeros(16, 3, 8, 8, dtype=torch.float64)), "DATA-066"),
        (legacy(prompt_ids=torch.zeros(1, 100, 8)), "DATA-066"),
        (legacy(prompt_mask=torch.zeros(1, 512)), "DATA-066"),
        (legacy(prompt_mask=torch.arange(512).gt(500)[None].long()), "DATA-066"),
        (legacy(video=torch.zeros(16, 3, 8, 10)), "DATA-067"),
        (legacy(video=torch.zeros(16, 4, 8, 8)), "DATA-067"),
        (legacy(video=torch.full((16, 3, 8, 8), float("nan"))), "DATA-013"),
    ],
)
def test_files_that_are_no_such_features(item: Any, id: str, tmp_path: Path) -> None:
    source = write(tmp_path / "old", [item])
    with pytest.raises(DataError) as caught:
        migrate(source, tmp_path / "new", MADE_WITH, show_progress=False)
    assert caught.value.id == id
    assert not (tmp_path / "new" / "data.jsonl").exists()


@pytest.mark.parametrize("task", ["i2v", "flf2v"])
def test_features_with_images(task: str, tmp_path: Path) -> None:
    pictures = images(last=task == "flf2v")
    batched = {name: value[None] for name, value in pictures.items()}
    source = write(tmp_path / "old", [legacy(3, **pictures), legacy(7, **batched)])
    migrate(source, tmp_path / "new", MADE_WITH, show_progress=False)
    dataset = open_features(feature_set(tmp_path / "new"), with_images(task, img_dim=4, clip_token_len=257))
    for item in (dataset[0], dataset[1]):
        assert torch.equal(item["features"]["image_features"], pictures["i2v_clip_feature"])
        assert torch.equal(item["features"]["condition"], pictures["i2v_vae_feature"])
    other = write(tmp_path / "mixed", [legacy(**pictures), legacy(**images(last=task == "i2v"))])
    with pytest.raises(DataError, match="DATA-049"):
        migrate(other, tmp_path / "refused", MADE_WITH, show_progress=False)
    assert not (tmp_path / "refused" / "data.jsonl").exists()


class Hostile:
    """Unpickling it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "old", [Hostile(tmp_path / "canary")])
    with pytest.raises(DataError, match="DATA-065"):
        migrate(source, tmp_path / "new", MADE_WITH, show_progress=False)
    assert not (tmp_path / "canary").exists()
    (tmp_path / "old" / "features" / "0_mp4.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DataError, match="DATA-065"):
        migrate(source, tmp_path / "new", MADE_WITH, show_progress=False)


def test_cuts_of_one_video_are_samples_of_their_own(tmp_path: Path) -> None:
    """Later versions of MindSpeed-MM list the video as path and the features as file."""
    items = [legacy(3), legacy(7), legacy(5)]
    source = write(tmp_path / "old", items)
    rows = [json.loads(line) for line in source.annotation.read_text().splitlines()]
    source.annotation.write_text("\n".join(json.dumps({**row, "path": rows[0]["path"]}) for row in rows))
    assert migrate(source, tmp_path / "new", MADE_WITH, show_progress=False) == 3
    dataset = open_features(feature_set(tmp_path / "new"), MODEL)
    assert [len(dataset[index]["prompt"]) for index in range(3)] == [3, 7, 5]
    assert dataset.name(0) == rows[0]["path"] and len({dataset.name(index) for index in range(3)}) == len(dataset) == 3
    source.annotation.write_text("\n".join(json.dumps(rows[0]) for _ in range(2)))
    with pytest.raises(DataError, match="DATA-064"):
        migrate(source, tmp_path / "again", MADE_WITH, show_progress=False)


def test_paths_and_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "old", [legacy()])
    rows = [{"path": "a", "file": "../x.pt", "cap": "x"}, {"path": "b"}, 3, {"path": "c", "cap": "\ud800"}]
    source.annotation.write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        migrate(source, tmp_path / "new", MADE_WITH, show_progress=False)
    assert [p.id for p in caught.value.problems] == ["DATA-063", "DATA-061", "DATA-061", "DATA-061"]
    assert not (tmp_path / "new").exists()
