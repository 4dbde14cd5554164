"""`mm train`, `mm data status` and `mm doctor data` on a store in object storage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from object_storage import S3, proxy_before, status
from ranks import ANY_PORT
from test_shards_training import to_shards
from training_runs import bits, metrics, run, run_on, words

from mm.cli import data
from mm.config.flags import as_words
from mm.errors import DataError

pytestmark = pytest.mark.usefixtures("s3_environment")


@pytest.fixture(scope="module")
def demo(demo_of_files: Path) -> Path:
    """Features of one file a sample, which are made shards of."""
    return demo_of_files


@pytest.fixture
def url(demo: Path, s3: S3, tmp_path: Path) -> str:
    to_shards(demo, tmp_path / "shards")
    return s3.upload(tmp_path / "shards", f"{tmp_path.name}/store")


def files(demo: Path, tmp_path: Path, url: str, **storage: object) -> dict[str, Path]:
    content = json.loads((demo / "configs" / "feature_data.json").read_text())
    basic = content["dataset_param"]["basic_parameters"]
    basic.pop("data_folder", None)
    basic |= {"data_path": url, "storage": storage}
    (tmp_path / "feature_data.json").write_text(json.dumps(content))
    return {"mm_data": tmp_path / "feature_data.json", "mm_model": demo / "configs" / "pretrain_model.json"}


@pytest.mark.nightly
def test_training_from_a_bucket_is_training_from_the_disk(demo: Path, url: str, tmp_path: Path) -> None:
    """Two processes with readers of their own, as a user starts them."""
    flags = {"train_iters": 4, "num_workers": 1, "micro_batch_size": 2}
    launcher = ["-m", "mm.cli.launch", "--nproc-per-node", "2", "--master-port", ANY_PORT]
    command = [sys.executable, *launcher, "-m", "mm.cli.train"]
    command += words(demo, tmp_path / "run", **flags, **files(demo, tmp_path, url))
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert bits(metrics(tmp_path / "run")) == bits(run_on(2, demo, tmp_path / "old", **flags))
    kept = {path.stat().st_size for path in (tmp_path / "cache" / "mm-wan" / "storage").glob("*/*")}
    assert len(kept) > 2


def test_a_storage_that_is_busy_for_a_while(demo: Path, s3: S3, url: str, tmp_path: Path) -> None:
    with proxy_before(s3) as proxy:
        proxy.fail(status(503, "SlowDown"), "body.bin", times=3)
        rows = run(demo, tmp_path / "run", train_iters=3, **files(demo, tmp_path, url, endpoint_url=proxy.endpoint))
        assert proxy.failed == 3
    assert bits(rows) == bits(run(demo, tmp_path / "old", train_iters=3))


def test_a_run_that_cannot_begin(demo: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DATA-183"):
        run(demo, tmp_path / "run", train_iters=3, **files(demo, tmp_path, "s3://nowhere/store"))
    with pytest.raises(DataError, match="DATA-010"):
        run(demo, tmp_path / "run", train_iters=3, **files(demo, tmp_path, f"{url}s"))


def test_status(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for store in (url, str(tmp_path / "shards")):
        capsys.readouterr()
        data.main(["status", store, "--json-output"])
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] and told[0]["finished"] and told[0]["samples"] == 16


@pytest.mark.nightly
def test_doctor(demo: Path, s3: S3, url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mm.cli.doctor_data", *as_words(files(demo, tmp_path, url))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert "16 samples, all of them can be used" in done.stdout, done.stderr
    key = f"{tmp_path.name}/store/shards/00000001/body.bin"
    damaged = bytearray(s3.get(key))
    damaged[len(damaged) // 2] ^= 1
    s3.put(key, bytes(damaged))
    (tmp_path / "cache").rename(tmp_path / "cache before")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 65 and "DATA-076: 1 of 16 samples cannot be used: 1 DATA-153" in done.stderr


def test_look(url: str, tmp_path: Path) -> None:
    """The same micro-batches as of the store on disk."""
    pages = []
    for store in (url, str(tmp_path / "shards")):
        data.main(["look", store, "--out", str(tmp_path / "look.html"), "--overwrite", "--batches", "1"])
        pages.append((tmp_path / "look.html").read_text().replace(store, "STORE"))
    assert pages[0] == pages[1]
