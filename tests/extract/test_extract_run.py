"""The stage as a whole: what it writes, how it goes on after a kill, what it refuses."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from annotated import load_samples
from feature_samples import (
    make_text_encoder,
    make_tokenizer,
    make_vae,
    write_clip,
    write_data_set,
    write_encoders,
    write_sound,
)
from feature_samples import write_extraction_files as write_files
from numbered_clips import write_numbered
from ranks import ANY_PORT
from store_content import content, is_finished, listed

from mm.cli.extract import main
from mm.config.data import data_sources
from mm.config.flags import as_words
from mm.config.model import WanConfig
from mm.config.rules.extraction import check_extraction
from mm.data.clips import load_clip
from mm.data.dataset import open_features
from mm.data.store.writer import ShardWriter
from mm.dialects.mindspeed.extraction import read_extraction
from mm.dialects.mindspeed.files import load_train_data
from mm.dialects.mindspeed.training import features
from mm.errors import ConfigError, DataError
from mm.extract.run import ExtractReport, extract

ROOT = Path(__file__).parents[2]
MODEL = WanConfig(text_dim=32, hidden_size=32, ffn_dim=64, num_heads=2, num_layers=1)
ROWS: list[dict[str, Any]] = [
    {"path": "videos/1.mp4", "cap": "a red circle", "num_frames": 14, "resolution": {"height": 48, "width": 64}},
    {"path": "videos/2.mp4", "cap": ["a blue square", "blue"]},
    {"path": "more/1.mp4", "cap": ""},
    {"path": "more/3.mp4", "cap": "a square moving left"},
    {"path": "more/4.mp4", "cap": "a square moving right"},
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def files(tmp_path: Path, weights: Path) -> dict[str, Path]:
    """A data set of five clips and the files that extract it to STORE."""
    annotation = write_data_set(tmp_path / "set", ROWS, num_frames=14)
    return write_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")


def run(files: dict[str, Path], rank: int = 0, world_size: int = 1, **options: Any) -> ExtractReport:
    flags = as_words({"seed": 3, **options})
    described = read_extraction([*words(files), *flags])
    check_extraction(described)
    return extract(described, device=torch.device("cpu"), rank=rank, world_size=world_size)


def words(files: dict[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]


def times(store: Path) -> dict[str, int]:
    """When each shard was made; there are no others."""
    shards = {path.name: (path / "body.bin").stat().st_mtime_ns for path in (store / "shards").iterdir()}
    assert not [name for name in [*shards, *os.listdir(store)] if name.startswith(".")]
    return shards


def made(store: Path) -> int:
    """Number of shards."""
    shards = store / "shards"
    return sum(not name.startswith(".") for name in os.listdir(shards)) if shards.is_dir() else 0


def edit(path: Path, *keys: str, value: Any) -> None:
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def opened(store: Path, tmp_path: Path, **preprocess: Any) -> Any:
    clip = {"num_frames": 9, "max_height": 32, "max_width": 48, **preprocess}
    (tmp_path / "data.txt").write_text(f"{store}\n")
    basic = {"data_path": str(tmp_path / "data.txt"), "data_storage_mode": "sorafeatured"}
    param = {"dataset_type": "t2v", "basic_parameters": basic, "preprocess_parameters": clip}
    (tmp_path / "feature_data.json").write_text(json.dumps({"dataset_param": param}))
    return open_features(features(load_train_data(tmp_path / "feature_data.json").dataset_param), MODEL)


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


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/", "/2", "a/b", "1/0", "1/2/3", "1.0/2"])
def test_parts_that_cannot_be(part: str, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=rf"CFG-225: --shard-of is '{part}'"):
        run(files, shard_of=part)


def test_torchrun_starts_it(files: dict[str, Path], tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NPUS_PER_NODE": "2",
        "MASTER_PORT": ANY_PORT,
        "MM_DATA": str(files["mm_data"]),
        "MM_MODEL": str(files["mm_model"]),
        "MM_TOOL": str(files["mm_tool"]),
        "LOG_DIR": str(tmp_path / "logs"),
        "OMP_NUM_THREADS": "1",
    }
    script = ROOT / "examples/wan2.1/feature_extract/feature_extraction.sh"
    command = ["bash", str(script), "--device", "cpu", "--seed", "3"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(listed(tmp_path / "store")) == 5
    (log,) = (tmp_path / "logs").iterdir()
    assert "5 samples are listed" in log.read_text()
    failed = subprocess.run(
        [*command, "--no-such-flag"],
        env={**environment, "NPUS_PER_NODE": "1", "LOG_DIR": str(tmp_path / "failed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert failed.returncode == 64
    (log,) = (tmp_path / "failed").iterdir()
    assert "CFG-007" in log.read_text()


@pytest.mark.nightly
def test_killed_in_the_middle_it_goes_on(tmp_path: Path, weights: Path) -> None:
    rows = [{"path": f"{index}.mp4", "cap": "a red circle"} for index in range(40)]
    annotation = write_data_set(tmp_path / "set", rows, num_frames=9)
    files = write_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")
    store = tmp_path / "store"
    for wanted in (1, 17):
        process = subprocess.Popen([sys.executable, "-m", "mm.cli.extract", *words(files), "--seed", "3"], cwd=ROOT)
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < 60 and made(store) < wanted:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not is_finished(store)
        assert wanted <= made(store) < 40
    (store / "shards" / ".tmp-left-behind").mkdir()
    complete = {path: path.stat().st_mtime_ns for path in (store / "shards").glob("0*/*.bin")}
    assert run(files) == ExtractReport(listed=40, encoded=40 - len(complete) // 2, reused=len(complete) // 2)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in complete.items())
    assert len(listed(store)) == 40 and len(times(store)) == 40
    dataset = opened(store, tmp_path)
    assert all(bool(torch.isfinite(dataset[index]["latents"]).all()) for index in range(40))


def test_ctrl_c_is_one_word_and_leaves_no_process(tmp_path: Path, weights: Path) -> None:
    rows = [{"path": f"{index}.mp4", "cap": "a red circle"} for index in range(40)]
    annotation = write_data_set(tmp_path / "set", rows, num_frames=9)
    files = write_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")
    command = [sys.executable, "-m", "mm.cli.extract", *words(files), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    store = tmp_path / "store"
    while not made(store) and process.poll() is None:
        time.sleep(0.001)
    family = psutil.Process(process.pid).children(recursive=True)
    assert sum(map(is_reader, family)) == 2
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told
    assert told.splitlines()[-1].startswith("error RUN-010: Ended by SIGINT. The features written so far stay")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not list((store / "shards").glob(".tmp*")) and not list((store / "work").glob("claims/*"))
    assert not is_finished(store)


@pytest.mark.parametrize(
    ("name", "keys", "value", "said"),
    [
        ("mm_data", ("dataset_param", "preprocess_parameters", "num_frames"), 5, "num_frames is 9, expected 5"),
        ("mm_data", ("dataset_param", "preprocess_parameters", "max_width"), 64, "width is 48, expected 64"),
        ("mm_model", ("ae", "dtype"), "bf16", "vae_dtype is fp32, expected bf16"),
        ("mm_model", ("ae", "enable_tiling"), True, "tile_size is None, expected (34, 34)"),
    ],
)
def test_a_store_of_another_recipe(
    name: str, keys: tuple[str, ...], value: Any, said: str, files: dict[str, Path], tmp_path: Path
) -> None:
    run(files)
    before = times(tmp_path / "store")
    edit(files[name], *keys, value=value)
    with pytest.raises(DataError) as caught:
        run(files)
    assert caught.value.id == "DATA-014" and said in str(caught.value)
    assert times(tmp_path / "store") == before and len(listed(tmp_path / "store")) == 5
    assert run(files, overwrite=True) == ExtractReport(listed=5, encoded=5, reused=0)


def test_other_weights_or_seed_are_another_recipe(files: dict[str, Path], tmp_path: Path) -> None:
    run(files)
    with pytest.raises(DataError, match=r"DATA-014.*seed is 3, expected 4"):
        run(files, seed=4)
    write_encoders(tmp_path / "other")
    vae = make_vae()
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 0.5
    vae.save_pretrained(tmp_path / "other" / "vae")
    edit(files["mm_model"], "ae", "from_pretrained", value=str(tmp_path / "other" / "vae"))
    with pytest.raises(DataError, match=r"DATA-014.*vae is"):
        run(files)
    edit(files["mm_model"], "text_encoder", "from_pretrained", value=str(tmp_path / "other" / "text_encoder"))
    with pytest.raises(DataError) as caught:  # a copy of the same text encoder is the same
        run(files)
    assert "text_encoder" not in str(caught.value)


def broken_video(kind: str, path: Path) -> None:
    path.unlink()
    if kind == "zero bytes":
        path.touch()
    elif kind == "truncated":
        write_clip(path, num_frames=40)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "audio only":
        write_sound(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "one frame":
        write_clip(path, num_frames=1)
    elif kind == "one frame short":
        write_clip(path, num_frames=8)


@pytest.mark.parametrize(
    ("kind", "id"),
    [
        ("zero bytes", "DATA-002"),
        ("truncated", "DATA-002"),
        ("audio only", "DATA-003"),
        ("missing", "DATA-001"),
        ("folder", "DATA-001"),
        ("fifo", "DATA-001"),
        ("one frame", "DATA-004"),
        ("one frame short", "DATA-004"),
    ],
)
def test_one_bad_video_stops_with_its_name(kind: str, id: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "set" / "more" / "3.mp4"
    broken_video(kind, path)
    with pytest.raises(DataError) as caught:
        run(files)
    assert caught.value.id == id and "more/3.mp4" in str(caught.value)
    assert not is_finished(tmp_path / "store")
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    write_clip(tmp_path / "set" / "more" / "3.mp4", num_frames=14)
    assert run(files).listed == 5


def test_a_clip_that_takes_too_long_stops_with_its_name(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DATA-070: .*[0-9]\.mp4: its reader gave nothing in 1e-06 s"):
        run(files, decode_timeout=1e-6)
    assert not is_finished(tmp_path / "store")
    assert run(files).encoded == 5


def test_a_reader_killed_for_its_memory_changes_nothing(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel would, when the first sample is about to be written."""
    killed: list[int] = []

    def kill(*args: Any) -> Any:
        if not killed:
            killed.extend(child.pid for child in psutil.Process().children(recursive=True) if is_reader(child))
            for reader in killed:
                os.kill(reader, signal.SIGKILL)
        return add(*args)

    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", kill)
    assert run(files, num_workers=2).encoded == 5
    assert len(killed) == 2
    monkeypatch.undo()
    edit(files["mm_tool"], "sorafeature", "save_path", value=str(tmp_path / "again"))
    run(files)
    assert content(tmp_path / "store") == content(tmp_path / "again")


def is_reader(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and "forkserver" in " ".join(parent.cmdline())


def test_short_videos_where_they_are_allowed(files: dict[str, Path], tmp_path: Path) -> None:
    write_clip(tmp_path / "set" / "more" / "3.mp4", num_frames=8)
    write_clip(tmp_path / "set" / "more" / "4.mp4", num_frames=1)
    edit(files["mm_data"], "dataset_param", "preprocess_parameters", "min_num_frames", value=1)
    run(files)
    sizes = [row["sample_size"] for row in listed(tmp_path / "store")]
    assert sizes == ["9x32x48", "9x32x48", "9x32x48", "5x32x48", "1x32x48"]
    assert sorted(opened(tmp_path / "store", tmp_path).shapes().values()) == [1, 1, 3]


def test_nothing_is_written_before_the_annotations_are_checked(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "set" / "data.json").write_text(json.dumps([{"path": "none.mp4"}, {"path": "../x", "cap": "x"}]))
    with pytest.raises(DataError) as caught:
        run(files)
    assert [p.id for p in caught.value.problems] == ["DATA-062", "DATA-001", "DATA-063"]
    assert not (tmp_path / "store").exists()


def test_videos_too_short_by_their_annotation_are_told_before_any_work(files: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "num_frames": 14 if index % 2 else 8} for index, row in enumerate(ROWS)]
    (tmp_path / "set" / "data.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        run(files)
    assert [p.id for p in caught.value.problems] == ["DATA-004"] * 3
    assert not (tmp_path / "store").exists()


def test_the_command_reports_all_files_at_once(files: dict[str, Path]) -> None:
    edit(files["mm_data"], "dataset_param", "preprocess_parameters", "num_frames", value=80)
    edit(files["mm_model"], "ae", "do_sample", value=True)
    edit(files["mm_tool"], "sorafeature", "save_pth", value="x")
    with pytest.raises(ConfigError) as caught:
        main(words(files))
    assert [p.id for p in caught.value.problems] == ["CFG-005", "CFG-003", "CFG-050"]


def test_encoders_that_give_nan_are_not_written(files: dict[str, Path], tmp_path: Path) -> None:
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(float("nan"))
    vae.save_pretrained(tmp_path / "nan")
    edit(files["mm_model"], "ae", "from_pretrained", value=str(tmp_path / "nan"))
    with pytest.raises(DataError, match="DATA-013"):
        run(files)
    assert os.listdir(tmp_path / "store" / "shards") == [] and not is_finished(tmp_path / "store")


def test_a_full_disk(files: dict[str, Path], tmp_path: Path) -> None:
    """On a file system of 20 KiB, which a private mount namespace makes possible without changing this machine's."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = f"mount -t tmpfs -o size=20k none '{disk}'"
    if subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True).returncode:
        pytest.skip("this machine allows no private mounts")
    edit(files["mm_tool"], "sorafeature", "save_path", value=str(disk / "store"))
    command = " ".join([sys.executable, "-m", "mm.cli.extract", *words(files), "--device", "cpu"])
    script = f"{inside} && {{ {command}; code=$?; find '{disk}' -name '.tmp*'; ls '{disk}'/store; exit $code; }}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 65, done.stderr
    assert "DATA-019" in done.stderr and str(disk / "store") in done.stderr
    assert ".tmp" not in done.stdout and "manifest.json" not in done.stdout and "recipe.json" in done.stdout


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
