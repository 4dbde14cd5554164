"""The Slurm and Kubernetes examples, run with small stand-ins for the commands of a cluster."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import free_port

from mm.supervise.rendezvous import SECRET

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "wan2.1" / "cluster"
SBATCH = CLUSTER / "slurm_pretrain.sbatch"
PRETRAIN = ROOT / "examples" / "wan2.1" / "1.3b" / "t2v" / "pretrain.sh"
TRAIN_WORDS = ("--train-iters", "2", "--save-interval", "2", "--num-workers", "0", "--device", "cpu")

# Runs the command once for each "node", all on this machine, and hands signals on, as srun does with one task a node.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
steps=
for name in USR1 TERM; do trap "kill -s $name \\$steps 2>/dev/null" "$name"; done
for node in 0 1; do SLURM_NODEID=$node "$@" & steps="$steps $!"; done
code=0
for step in $steps; do
    while kill -0 "$step" 2>/dev/null; do now=0; wait "$step" || now=$?; done
    [ "${now:-0}" -le "$code" ] || code=$now
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf '127.0.0.1\\nsecond-node\\n' ;;
    "requeue 4711") touch "$REQUEUED" ;;
    *) echo "unexpected: scontrol $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script of a job with two nodes."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "REQUEUED": str(tmp_path / "requeued"),
    }


def tiny(demo: Path, save: Path) -> dict[str, str]:
    """The variables of pretrain.sh for the embedded default, one process a node."""
    return {
        "NPUS_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "MBS": "2",
        "PRECISION": "fp32",
        "MM_DATA": str(demo / "configs" / "feature_data.json"),
        "MM_MODEL": str(demo / "configs" / "pretrain_model.json"),
        "LOAD_PATH": str(demo / "weights" / "Wan2.1-T2V-Tiny-Diffusers" / "transformer"),
        "SAVE_PATH": str(save),
    }


def assert_two_processes_trained(save: Path) -> None:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [row["consumed_samples"] for row in rows] == [4, 8]
    manifest = json.loads((save / "iter_0000002" / "manifest.json").read_text())
    assert manifest["world_size"] == 2


@pytest.mark.nightly
def test_sbatch_trains_on_two_nodes(demo: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    save = tmp_path / "run"
    done = subprocess.run(
        ["bash", SBATCH, *TRAIN_WORDS], env={**slurm, **tiny(demo, save)}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_two_processes_trained(save)


@pytest.mark.nightly
def test_sbatch_refuses_nodes_whose_scripts_differ(demo: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    """One node's copy of the script has another learning rate: no step is taken, and the log says which and where."""
    script = tmp_path / "pretrain.sh"
    script.write_text(f'[ "$NODE_RANK" = 0 ] || set -- "$@" --lr 0.25\nexec bash {PRETRAIN} "$@"\n')
    save = tmp_path / "run"
    environment = {**slurm, **tiny(demo, save), "SCRIPT": str(script)}
    done = subprocess.run(["bash", SBATCH, *TRAIN_WORDS], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode not in (0, 124)
    log = (save / "train.log").read_text()
    assert re.search(r"error CFG-090: .*: rank 1 \(.*\), with flags: lr is 0.25, on rank 0 1e-05", log), log[-3000:]
    assert not (save / "metrics.jsonl").exists()


NODE = """
trap '{on_usr1}' USR1
touch {folder}/started.$NODE_RANK
until [ -e {folder}/finish ]; do sleep 0.05; done
exit 7
"""


def start_job(folder: Path, slurm: dict[str, str], on_usr1: str) -> subprocess.Popen[str]:
    """A job whose script ends with 7 once the file `finish` is there, or does what it is told on SIGUSR1."""
    script = folder / "script.sh"
    script.write_text(NODE.format(folder=folder, on_usr1=on_usr1))
    environment = {**slurm, "SCRIPT": str(script)}
    job = subprocess.Popen(["bash", SBATCH], env=environment, stdout=subprocess.PIPE, text=True)
    wait_for(folder / "started.0", folder / "started.1")
    return job


def test_sbatch_requeues_near_the_time_limit_what_has_saved(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = start_job(tmp_path, slurm, on_usr1="exit 75")
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 75
    assert "saved: requeueing job 4711" in output
    assert Path(slurm["REQUEUED"]).exists()


def test_sbatch_requeues_what_has_not_saved_in_time(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = start_job(tmp_path, {**slurm, "SAVE_SECONDS": "1"}, on_usr1=":")
    job.send_signal(signal.SIGUSR1)
    wait_for(Path(slurm["REQUEUED"]))
    assert job.poll() is None
    (tmp_path / "finish").touch()
    job.communicate(timeout=20)
    assert job.returncode == 7


@pytest.mark.parametrize("near_the_limit", [True, False])
def test_sbatch_does_not_requeue_what_fails(tmp_path: Path, slurm: dict[str, str], near_the_limit: bool) -> None:
    job = start_job(tmp_path, slurm, on_usr1=f"touch {tmp_path}/asked.$NODE_RANK")
    if near_the_limit:
        job.send_signal(signal.SIGUSR1)
        wait_for(tmp_path / "asked.0", tmp_path / "asked.1")
    (tmp_path / "finish").touch()
    job.communicate(timeout=20)
    assert job.returncode == 7
    assert not Path(slurm["REQUEUED"]).exists()


@pytest.mark.nightly
def test_sbatch_saves_near_the_time_limit(demo: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    """With the real script on two "nodes": each of them is asked, and one checkpoint is there."""
    save = tmp_path / "run"
    words = ("--train-iters", "100000", "--num-workers", "0", "--device", "cpu")
    environment = {**slurm, **tiny(demo, save)}
    job = subprocess.Popen(["bash", SBATCH, *words], env=environment, stdout=subprocess.PIPE, text=True)
    wait_for(save / "metrics.jsonl", within_s=120)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output[-3000:]
    assert len(list(save.glob("iter_*"))) == 1
    assert "saved: requeueing job 4711" in output


def wait_for(*paths: Path, within_s: float = 20) -> None:
    until = time.monotonic() + within_s
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, f"not there: {paths}"
        time.sleep(0.05)


def test_sbatch_parses_and_gives_each_node_its_place(tmp_path: Path, slurm: dict[str, str]) -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True)
    script = tmp_path / "script.sh"
    script.write_text('echo "$NODE_RANK of $NNODES, $NPUS_PER_NODE each, at $MASTER_ADDR:$MASTER_PORT: $*"\n')
    done = subprocess.run(
        ["bash", SBATCH, "--a", "b c"],
        env={**slurm, "SCRIPT": str(script)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert sorted(done.stdout.splitlines()) == [f"{node} of 2, 8 each, at 127.0.0.1:24711: --a b c" for node in (0, 1)]


def pods() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod templates of master and workers."""
    job = yaml.safe_load((CLUSTER / "pytorchjob_pretrain.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    return replicas["Master"]["template"]["spec"], replicas["Worker"]["template"]["spec"]


def read_by(script: Path) -> set[str]:
    """The variables that a script, and what it shares with others, take from the environment."""
    shared = script.parents[2] / "common.sh"
    return set(re.findall(r"^ *(\w+)=\$\{\1:-", script.read_text() + shared.read_text(), re.M))


def test_pytorchjob_sets_what_the_script_reads() -> None:
    master, worker = pods()
    assert master == worker
    [container] = master["containers"]
    assert container["name"] == "pytorch"  # where the operator puts its variables
    assert container["command"] == ["bash", "-c"]
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert [entry["name"] for entry in container["env"] if "valueFrom" in entry] == [SECRET]  # kept by the cluster
    assert all(isinstance(value, str) for value in environment.values())
    script = ROOT / environment.pop("SCRIPT")
    assert script == PRETRAIN
    exported = set(re.findall(r"\b(\w+)=", re.search(r"^export (.*)$", container["args"][0], re.M)[1]))
    assert exported == {"NNODES", "NODE_RANK"}
    assert set(environment) | exported | {"MASTER_ADDR", "MASTER_PORT"} <= read_by(script)
    assert master["terminationGracePeriodSeconds"] >= 600  # a checkpoint of a large model must fit
    assert re.search(r"^ *exec bash", container["args"][0], re.M)  # a shell that waits would keep SIGTERM to itself
    assert int(environment["NPUS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(environment[name].startswith("/data/") for name in ("MM_DATA", "LOAD_PATH", "SAVE_PATH"))
    assert {"/data", "/dev/shm"} == set(mounted)
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in master["volumes"]]


@pytest.mark.parametrize(
    "operator",
    [{"WORLD_SIZE": "3"}, {"WORLD_SIZE": "24", "PET_NNODES": "3", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "2"}],
    ids=["counting-pods", "counting-processes"],
)
def test_pytorchjob_gives_each_pod_its_place(tmp_path: Path, operator: dict[str, str]) -> None:
    script = tmp_path / "script.sh"
    script.write_text('echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT ${RANK-no} ${WORLD_SIZE-no}"\n')
    container = pods()[0]["containers"][0]
    environment = {**os.environ, **operator, "RANK": "2", "MASTER_ADDR": "m-0", "MASTER_PORT": "23456"}
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={**environment, "SCRIPT": str(script)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "2 of 3 at m-0:23456 no no\n"


@pytest.mark.nightly
def test_pytorchjob_trains_on_two_pods(demo: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    container = pods()[0]["containers"][0]
    script = tmp_path / "script.sh"  # the example's command takes no flags
    script.write_text(f"exec bash {PRETRAIN} {' '.join(TRAIN_WORDS)}\n")
    environment = {**os.environ, **tiny(demo, save), "SCRIPT": str(script), "MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [*container["command"], *container["args"]],
            env={**environment, "RANK": str(pod), "WORLD_SIZE": "2", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for pod in range(2)
    ]  # fmt: skip
    outputs = [pod.communicate(timeout=200)[0] for pod in started]
    assert [pod.returncode for pod in started] == [0, 0], outputs
    assert_two_processes_trained(save)
