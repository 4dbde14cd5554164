"""Extraction of several cuts of one video, and of data sets and weights that are links."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from feature_samples import make_vae, write_clip, write_extraction_files
from store_content import listed, shards_of
from store_content import stored as tensors_of

from mm.cli.extract import main
from mm.data.transforms import resize_and_crop

VIDEO = "videos/1.mp4"


def extract(files: dict[str, Path]) -> None:
    main([word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))])


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def latents_of(video: Path, start: int) -> torch.Tensor:
    """By PyAV's plain decode and diffusers' VAE alone: 9 frames from `start`, [16, 3, 4, 6]."""
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pixels = resize_and_crop(torch.from_numpy(np.stack(frames[start : start + 9])).permute(0, 3, 1, 2), 32, 48)
    vae = make_vae()
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        return ((vae.encode(pixels.transpose(0, 1)[None]).latent_dist.mode() - mean) / std)[0]


def stored(store: Path) -> list[tuple[dict[str, Any], torch.Tensor]]:
    tensors = tensors_of(store)
    return [(row, tensors[row["sample"]]["latents"]) for row in listed(store)]


def test_each_cut_has_its_own_frames_and_another_cut_is_extracted_again(tmp_path: Path, weights: Path) -> None:
    folder, store = tmp_path / "set", tmp_path / "store"
    write_clip(folder / VIDEO, num_frames=40)
    cuts = [[0, 10], [12, 22], [25]]
    rows = [{"path": VIDEO, "cap": "a red circle", "cut": cut} for cut in cuts]
    files = write_extraction_files(tmp_path, weights, write_rows(folder, rows), folder, store)
    extract(files)
    found = stored(store)
    assert [row["sample"] for row, _ in found] == [VIDEO, f"{VIDEO}//12-22", f"{VIDEO}//25-"]
    for (row, latents), cut in zip(found, cuts, strict=True):
        begin, end = [*cut, 40][:2]
        assert begin <= row["start_frame_idx"] and row["start_frame_idx"] + 9 <= end
        assert torch.allclose(latents, latents_of(folder / VIDEO, row["start_frame_idx"]), rtol=1e-5, atol=1e-5)
    before = shards_of(store)
    write_rows(folder, [{**rows[0], "cut": [30, 39]}, *rows[1:]])
    extract(files)
    changed = {name.split("/")[1] for name, value in shards_of(store).items() if before[name] != value}
    assert changed == {"00000000"}, "a shard a row"
    assert listed(store)[0]["start_frame_idx"] == 30


def test_data_and_weights_in_the_layout_of_a_hubs_cache(tmp_path: Path, weights: Path) -> None:
    """Every file of snapshots/ is a link to ../../blobs; the features are those of plain files."""

    def as_cache(source: Path, target: Path) -> Path:
        for number, file in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
            link, blob = target / "snapshots" / "0123" / file.relative_to(source), target / "blobs" / f"{number:040x}"
            for place in (link, blob):
                place.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(file.read_bytes())
            link.symlink_to(Path(*[".."] * (len(link.relative_to(target).parts) - 1)) / "blobs" / blob.name)
        return target / "snapshots" / "0123"

    plain = tmp_path / "plain" / "set"
    write_clip(plain / VIDEO, num_frames=14)
    write_rows(plain, [{"path": VIDEO, "cap": "a red circle"}])
    hub = as_cache(plain, tmp_path / "hub" / "datasets--a--b")
    places = {
        "plain": (weights, plain),
        "hub": (as_cache(weights, tmp_path / "hub" / "models--a--b"), hub),
    }
    found = {}
    for name, (models, folder) in places.items():
        (tmp_path / name).mkdir(exist_ok=True)
        store = tmp_path / name / "store"
        extract(write_extraction_files(tmp_path / name, models, folder / "data.json", folder, store))
        ((row, latents),) = stored(store)
        found[name] = row["sample"], latents, json.loads((store / "recipe.json").read_text())
    assert found["hub"][0] == found["plain"][0] and found["hub"][2] == found["plain"][2]
    assert torch.equal(found["hub"][1], found["plain"][1])
