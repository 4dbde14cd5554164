"""Shared by all tests. Its presence also puts tests/ on sys.path, so that tests import `ranks` and their helpers."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from extracted import extract

from mm.cli.imports import large_imports

if TYPE_CHECKING:
    from object_storage import S3, Proxy

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # reads the number of threads when it is imported
from ranks import start_server

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is wrong, and must fail at once
if not torch.cuda.is_available():
    # Triton's own functions are made when it is first imported, for the interpreter or for a device, and megatron-core
    # imports it: so this must stand before all other imports.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the word for the CPU that jobs of several processes need


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the server that ranks and readers are forked from, with what both import, before either does so alone.

    A shell lets its background jobs ignore SIGINT and SIGQUIT, and all that they start inherit it: tests of these start
    processes that must not.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    if (
        not session.config.option.collectonly
        and not hasattr(session.config, "workerinput")
        and session.config.getoption("numprocesses", None)
    ):
        return  # pytest-xdist's own process runs no tests
    start_server()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import all modules of tests, and what they import."""
    with large_imports():
        return (yield)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The folder of real clips with its data.json, where the machine has one."""
    folder = os.environ.get("MM_REAL_CLIPS")
    if not folder:
        pytest.skip("MM_REAL_CLIPS is not set; it names a folder with data.json and videos/")
    return Path(folder)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[S3]":
    """An S3 server on loopback, for all tests; each has its own part of the one bucket."""
    from object_storage import s3_server

    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3: "S3", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands need to reach that server, and a cache of the test's own."""
    for name, value in {**s3.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(s3: "S3") -> "Iterator[Proxy]":
    """A proxy before the server, which can fail."""
    from object_storage import proxy_before

    with proxy_before(s3) as found:
        yield found


@pytest.fixture(scope="session")
def demo(extracted_demo: Path) -> Path:
    """The embedded default with its features extracted: what a user has after the first two stages."""
    return extracted_demo


@pytest.fixture(scope="session")
def extracted_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, where a module's own `demo` is made of it."""
    from mm.cli import demo as demo_command

    home = tmp_path_factory.mktemp("workspace") / "demo"
    demo_command.main(["--out", str(home)])
    extract(home / "configs")
    return home


@pytest.fixture(scope="session")
def demo_of_files(extracted_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with features of one file a sample, as earlier versions extracted them."""
    from store_content import as_files

    home = Path(shutil.copytree(extracted_demo, tmp_path_factory.mktemp("files") / "demo", symlinks=True))
    for path in filter(Path.is_file, (home / "configs").rglob("*")):
        path.write_text(path.read_text().replace(str(extracted_demo), str(home)))
    as_files(home / "features")
    return home


@pytest.fixture(scope="session")
def model_json(extracted_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrain_model.json without a precision of its own, so that --bf16 alone decides."""
    content = json.loads((extracted_demo / "configs" / "pretrain_model.json").read_text())
    del content["predictor"]["dtype"]
    path = tmp_path_factory.mktemp("model") / "pretrain_model.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def demo_of_images(demo: Path) -> Path:
    """The same with the features of i2v and flf2v beside them."""
    for task in ("i2v", "flf2v"):
        extract(demo / "configs" / task)
    return demo
