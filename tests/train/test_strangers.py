"""A stranger who reaches a job's store, or tries to: what he writes there ends no job, and never reports success."""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from ranks import free_port
from torch.distributed.distributed_c10d import PrefixStore
from training_runs import words

from mm.errors import EXIT_INTERNAL, ConfigError
from mm.supervise.mailbox import Failure, Mailbox
from mm.supervise.messages import Messages
from mm.supervise.rendezvous import SECRET, job_secret, serve_store
from mm.supervise.watchdog import LEAVE_S

ROOT = Path(__file__).parents[2]
SECONDS = datetime.timedelta(seconds=1)
FORGED = [
    json.dumps({"rank": 0, "exit_code": 0, "text": "done"}),  # what an unsigned message was
    "-" * 64 + " " + json.dumps([0, "", {"rank": 0, "exit_code": 0, "text": "done"}]),
    "0" * 64 + " " + json.dumps([10**9, "", {"rank": 0, "exit_code": 0, "text": "done"}]),
    "",
    "\0" * 100,
    "[" * 100_000,
]


def both(secret: bytes | None = b"of the job") -> tuple[dist.Store, Messages, Messages]:
    store = dist.HashStore()
    return store, Messages(store, secret, "start 0.1"), Messages(store, secret, "start 0.1")


@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_forged_messages_are_ignored_and_counted(forged: str, caplog: pytest.LogCaptureFixture) -> None:
    store, one, other = both()
    store.set("failure", forged)
    assert Mailbox(other, 1, 2).failure() is None and Mailbox(other, 1, 2).failure() is None
    assert other.forged == 1 and caplog.text.count("is not of this job") == 1  # the same one again is no news
    assert Mailbox(one, 0, 2).publish(Failure(0, 64, "true"))  # and takes nobody's place
    assert Mailbox(other, 1, 2).failure() == Failure(0, 64, "true")
    assert not Mailbox(other, 1, 2).publish(Failure(1, 70, "later"))
    store.append("roll", f"{forged}\n")
    one.append("roll", [1])
    assert other.roll("roll") == [[1]]


def test_messages_hold_under_their_name_in_their_start_only(tmp_path: Path) -> None:
    store, one, other = both()
    one.write("seen 0", "early")
    early = store.get("seen 0").decode()
    one.write("seen 0", "late")
    assert other.read("seen 0") == "late"
    store.set("seen 0", early)  # put back
    assert other.read("seen 0") == "late" and other.forged == 1
    store.set("seen 1", early)  # moved
    assert other.read("seen 1") is None
    assert Messages(store, b"of the job", "start 1.1").read("seen 0") is None  # of the start before
    assert Messages(store, b"of another job", "start 0.1").read("seen 0") is None
    with pytest.raises(dist.DistStoreError):
        other.wait("seen 1", SECONDS)
    store.delete_key("seen 0")
    assert other.read("seen 0") is None


def test_no_failure_says_success() -> None:
    """Where messages are not signed a stranger can end a job, but not as if it were done."""
    for code in (0, -1, 256, "0", None):
        assert Failure(0, code, "").exit_code == EXIT_INTERNAL  # type: ignore[arg-type]
    for forged in FORGED:
        store, _, other = both(secret=None)
        store.set("failure", forged)
        failure = Mailbox(other, 1, 2).failure()
        assert failure is None or failure.exit_code == EXIT_INTERNAL
    for told in ([], "text", 3, {"rank": 0}, {"unknown": 1}):
        _, _, other = both(secret=None)
        other.write("failure", told)
        assert Mailbox(other, 1, 2).failure() is None


def test_a_store_listens_on_its_own_address_alone() -> None:
    for name, address in (("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")):
        before = listening(os.getpid())  # the kernel may give the same port out again, at another address
        store = serve_store(name, 0, 10 * SECONDS)
        assert listening(os.getpid()) - before == {(address, store.port)}  # type: ignore[attr-defined]
        again = dist.TCPStore(name, store.port, 1, True, 10 * SECONDS, multi_tenant=True)  # type: ignore[attr-defined]
        again.set("here", "too")
        assert store.get("here") == b"too"
        with pytest.raises(dist.DistNetworkError, match="EADDRINUSE"):
            serve_store(name, store.port, SECONDS)  # type: ignore[attr-defined]
    for name in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(ConfigError, match=f"CFG-150.*{name}"):
            serve_store(name, 0, SECONDS)


def test_a_secret_that_can_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "")
    assert job_secret() is None
    monkeypatch.setenv(SECRET, "short")
    with pytest.raises(ConfigError, match="CFG-151"):
        job_secret()


def listening(process: int) -> set[tuple[str, int]]:
    """Addresses and ports at which a process listens."""
    places = psutil.Process(process).net_connections("inet")
    return {tuple(place.laddr) for place in places if place.status == "LISTEN"}


def launch(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mm.cli.launch", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.fixture
def job(demo: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """A run of two processes in its steps, its folder and its port; killed at the end."""
    save, port = tmp_path / "save", free_port()
    flags = words(demo, save, train_iters=100_000, micro_batch_size=2, save_on_signal=True)
    process = launch(
        "--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port", port, "-m", "mm.cli.train", *flags
    )
    try:
        wait_for_steps(process, save, 3)
        yield process, save, port
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            child.kill()
        process.communicate()


def wait_for_steps(process: subprocess.Popen[str], save: Path, count: int) -> None:
    until = time.monotonic() + 120
    while not (save / "metrics.jsonl").exists() or len((save / "metrics.jsonl").read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.nightly
def test_a_stranger_ends_no_job(job: tuple[subprocess.Popen[str], Path, int]) -> None:
    """He writes every message he can think of, under every key that there is; then the job stops as it is asked to."""
    process, save, port = job
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    places = set().union(*(listening(pid) for pid in family))
    assert places and {address for address, _ in places} == {"127.0.0.1"}, places
    for address in {place.address for every in psutil.net_if_addrs().values() for place in every}:
        if ":" not in address and not address.startswith("127.") and address.count(".") == 3:
            with pytest.raises(OSError), socket.create_connection((address, port), timeout=2):
                pass  # the store of the job is not there
    stranger = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=10 * SECONDS, wait_for_workers=False)  # type: ignore[attr-defined]
    mailbox = PrefixStore("start 0.1/mailbox", stranger)
    for forged in FORGED[:3]:
        for name in ("failure", "alarm", "seen 0", "doing 0", "doing 1"):
            mailbox.set(name, forged)
        stranger.set("how the start before ended", forged)
        time.sleep(1.5)  # the watch looks once a second
    time.sleep(LEAVE_S)  # after which it would leave a job that has failed
    wait_for_steps(process, save, len((save / "metrics.jsonl").read_text().splitlines()) + 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert 'A message "failure" in the job\'s store is not of this job' in said


def test_without_a_port_the_job_chooses_one_for_itself(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, psutil\n"
        "parent = psutil.Process().parent()\n"
        "places = {c.laddr for c in parent.net_connections('inet') if c.status == 'LISTEN'}\n"
        "assert places == {(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))}\n"
        "assert os.environ['MASTER_ADDR'] == '127.0.0.1'\n"
        f"assert len(os.environ[{SECRET!r}]) == 64\n"
        f"(pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']).touch()\n"
    )
    for number, flags in enumerate(([], ["--standalone"])):
        process = launch("--nproc-per-node", 2, *flags, program)
        _, said = process.communicate(timeout=90)
        assert process.returncode == 0, said
        assert (tmp_path / "0").exists() and (tmp_path / "1").exists(), number
        (tmp_path / "0").unlink()


def test_a_rendezvous_that_unpickles_is_refused() -> None:
    process = launch("--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "nothing.py")
    _, said = process.communicate(timeout=90)
    assert process.returncode == 64 and said.startswith("error CFG-152: --rdzv-backend is c10d"), said
