"""The stage as a whole: what it writes, and how it goes on."""

import json
import logging
from pathlib import Path

import pytest
import torch
from annotated import load_samples
from extraction_runs import ROWS, edit, made, opened, run, times, words
from feature_samples import make_text_encoder, make_tokenizer, make_vae, write_clip
from feature_samples import write_extraction_files as write_files
from numbered_clips import write_numbered
from store_content import content, is_finished, listed

from mm.config.data import data_sources
from mm.data.clips import load_clip
from mm.dialects.mindspeed.extraction import read_extraction
from mm.extract.run import ExtractReport


def test_clips_that_decord_does_not_read_are_counted(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("decord")
    write_numbered(tmp_path / "set" / "more" / "3.mp4", container_format="mpegts")
    edit(files["mm_data"], "dataset_param", "preprocess_parameters", "video_reader_type", value="decord")
    with caplog.at_level(logging.WARNING):
        assert run(files).encoded == 5
    assert "1 of 5 clips: read with PyAV and not with decord" in caplog.text


def test_features_are_what_the_encoders_give_for_each_clip(files: dict[str, Path], tmp_path: Path) -> None:
    """Recomputed here with diffusers and transformers alone."""
    assert run(files) == ExtractReport(listed=5, encoded=5, reused=0)
    dataset = opened(tmp_path / "store", tmp_path)
    data = read_extraction(words(files)).data
    samples = load_samples(data_sources(data.path, data.folder))
    vae, tokenizer = make_vae(), make_tokenizer()
    text_encoder = make_text_encoder(len(tokenizer))
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    assert [dataset.name(index) for index in range(len(dataset))] == [row["path"] for row in ROWS]
    for index, (sample, row) in enumerate(zip(samples, listed(tmp_path / "store"), strict=True)):
        clip = load_clip(sample, data.clip, seed=3)
        ids = tokenizer(row["cap"], return_tensors="pt").input_ids
        with torch.no_grad():
            latents = (vae.encode(clip.pixels[None]).latent_dist.mode() - mean) / std
            prompt = text_encoder(ids).last_hidden_state[0]
        item = dataset[index]
        assert torch.allclose(item["latents"], latents[0], rtol=1e-5, atol=1e-5)
        assert torch.allclose(item["prompt"], prompt, rtol=1e-5, atol=1e-5)
        assert row["start_frame_idx"] == clip.start and row["sample_size"] == "9x32x48"
        assert row["latent_shape"] == [16, 3, 4, 6] and row["text_tokens"] == len(prompt)
        assert row["cap"] == sample.caption(3)
    assert torch.allclose(dataset.empty_prompt(), text_encoder(torch.tensor([[1]])).last_hidden_state[0], atol=1e-5)


def test_a_second_run_does_nothing_and_says_so(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(files)
    before = times(tmp_path / "store"), (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    caplog.set_level(logging.INFO)
    assert run(files) == ExtractReport(listed=5, encoded=0, reused=5)
    assert (times(tmp_path / "store"), (tmp_path / "store" / "manifest.json").stat().st_mtime_ns) == before
    assert "5 samples are listed" in caplog.text and "nothing was left to encode" in caplog.text


def test_only_what_changed_is_encoded_again(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(files)
    before = times(tmp_path / "store")
    rows = [dict(row) for row in ROWS]
    rows[0]["cap"] = "another caption"
    del rows[4]
    (tmp_path / "set" / "data.json").write_text(json.dumps(rows))
    write_clip(tmp_path / "set" / "more" / "3.mp4", num_frames=15)
    damaged = tmp_path / "store" / "shards" / "00000001" / "body.bin"  # a shard a row
    damaged.write_bytes(damaged.read_bytes()[:-100])
    caplog.set_level(logging.INFO)
    assert run(files) == ExtractReport(listed=4, encoded=3, reused=1)
    after = times(tmp_path / "store")
    assert {name for name in after if before[name] == after[name]} == {"00000002"} and len(after) == 4
    assert listed(tmp_path / "store")[0]["cap"] == "another caption"
    dataset = opened(tmp_path / "store", tmp_path)
    assert len([dataset[index] for index in range(len(dataset))]) == 4
    assert "was made of 5 rows, and 4 are listed now" in caplog.text
    assert "4 shards of" in caplog.text and "are not as planned now" in caplog.text
    (tmp_path / "set" / "data.json").write_text(json.dumps(ROWS[4:] + rows))
    assert run(files) == ExtractReport(listed=5, encoded=1, reused=4), "rows that moved are copied"


def test_two_processes_share_the_work(files: dict[str, Path], tmp_path: Path, weights: Path) -> None:
    """Each makes its part, the second one finishes the store; its bytes are those of a single process."""
    store = tmp_path / "store"
    assert run(files, shard_of="1/2") == ExtractReport(listed=0, encoded=3, reused=0)
    assert made(store) == 3 and not is_finished(store)
    mine = {path: path.stat().st_mtime_ns for path in (store / "shards").rglob("*.bin")}
    assert run(files, shard_of="1/2") == ExtractReport(listed=0, encoded=0, reused=3)
    assert run(files, shard_of="2/2") == ExtractReport(listed=5, encoded=2, reused=3)
    assert all(path.stat().st_mtime_ns == time for path, time in mine.items())
    alone = write_files(tmp_path / "alone", weights, tmp_path / "set/data.json", tmp_path / "set", tmp_path / "one")
    run(alone)
    assert content(tmp_path / "one") == content(store)
    run(write_files(tmp_path / "r", weights, tmp_path / "set/data.json", tmp_path / "set", tmp_path / "two"), 1, 2)
    assert content(tmp_path / "two") == content(store), "a rank whose other never came makes all shards"


def test_short_videos_where_they_are_allowed(files: dict[str, Path], tmp_path: Path) -> None:
    write_clip(tmp_path / "set" / "more" / "3.mp4", num_frames=8)
    write_clip(tmp_path / "set" / "more" / "4.mp4", num_frames=1)
    edit(files["mm_data"], "dataset_param", "preprocess_parameters", "min_num_frames", value=1)
    run(files)
    sizes = [row["sample_size"] for row in listed(tmp_path / "store")]
    assert sizes == ["9x32x48", "9x32x48", "9x32x48", "5x32x48", "1x32x48"]
    assert sorted(opened(tmp_path / "store", tmp_path).shapes().values()) == [1, 1, 3]


def test_real_clips(real_clips: Path, weights: Path, tmp_path: Path) -> None:
    """Six clips of 480 to 1024 pixels, 8 to 30 frames a second, all at a small size."""
    store = tmp_path / "store"
    clip = {"num_frames": 17, "max_height": 64, "max_width": 96}
    files = write_files(tmp_path, weights, real_clips / "data.json", real_clips, store, **clip)
    edit(files["mm_model"], "ae", "dtype", value="bf16")
    assert run(files).encoded == 6
    dataset = opened(store, tmp_path, **clip)
    assert [tuple(dataset[i]["latents"].shape) for i in range(6)] == [(16, 5, 8, 12)] * 6
    assert dataset[0]["latents"].dtype == torch.bfloat16
