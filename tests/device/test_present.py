"""A machine whose accelerator cannot be used, and a job of several processes, do not move to the CPU in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import ANY_PORT

from mm.device.backend import select
from mm.device.present import refuse_silent_cpu, require_kernels, sign_of
from mm.errors import ConfigError

MACHINES = {
    "NVIDIA, driver and device": (["dev/nvidia0", "dev/nvidiactl"], {}, "cuda", "/dev/nvidia0"),
    "NVIDIA, a container without its devices": (
        ["proc/driver/nvidia/version"],
        {},
        "cuda",
        "/proc/driver/nvidia/version",
    ),
    "NVIDIA, no driver": ([], {"0000:81:00.0": ("0x10de", "0x030200")}, "cuda", "/sys/bus/pci/devices/0000:81:00.0"),
    "WSL": (["usr/lib/wsl/lib/libcuda.so.1"], {}, "cuda", "/usr/lib/wsl/lib/libcuda.so.1"),
    "Ascend": (["dev/davinci3", "dev/davinci_manager"], {}, "npu", "/dev/davinci3"),
    "another's display": ([], {"0000:00:02.0": ("0x8086", "0x030000")}, None, None),
    "NVIDIA's sound": ([], {"0000:81:00.1": ("0x10de", "0x040300")}, None, None),
    "only the manager of NPUs": (["dev/davinci_manager"], {}, None, None),
    "nothing": ([], {}, None, None),
}


def machine(root: Path, files: list[str], pci: dict[str, tuple[str, str]]) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    for address, (vendor, kind) in pci.items():
        device = root / "sys/bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    return root


@pytest.mark.parametrize("name", MACHINES)
def test_a_device_that_torch_does_not_see_is_named(name: str, tmp_path: Path) -> None:
    files, pci, kind, sign = MACHINES[name]
    root = machine(tmp_path, files, pci)
    assert {one: sign_of(one, root) for one in ("cuda", "npu") if sign_of(one, root)} == ({kind: sign} if kind else {})
    if kind is None:
        refuse_silent_cpu(1, {}, root)
        return
    for processes in (1, 8):
        with pytest.raises(ConfigError) as refused:
            refuse_silent_cpu(processes, {}, root)
        assert refused.value.id == "CFG-180"
        assert sign in str(refused.value) and "--device cpu" in str(refused.value)


@pytest.mark.parametrize("word", ["", "-1", " "])
def test_hiding_the_devices_is_a_word_for_the_cpu(word: str, tmp_path: Path) -> None:
    nvidia = machine(tmp_path / "a", ["dev/nvidia0"], {})
    refuse_silent_cpu(2, {"CUDA_VISIBLE_DEVICES": word}, nvidia)
    ascend = machine(tmp_path / "b", ["dev/davinci0"], {})
    refuse_silent_cpu(2, {"ASCEND_RT_VISIBLE_DEVICES": word}, ascend)
    with pytest.raises(ConfigError, match="CFG-180"):  # of another kind
        refuse_silent_cpu(1, {"CUDA_VISIBLE_DEVICES": word}, ascend)
    with pytest.raises(ConfigError, match="CFG-180"):
        refuse_silent_cpu(1, {"CUDA_VISIBLE_DEVICES": "0"}, nvidia)


def test_several_processes_need_a_device_or_a_word(tmp_path: Path) -> None:
    refuse_silent_cpu(1, {}, tmp_path)
    with pytest.raises(ConfigError, match="CFG-181: 2 processes"):
        refuse_silent_cpu(2, {}, tmp_path)
    assert select("cpu", 1, 2).kind == "cpu"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, ["dev/nvidia0"], {})
    with pytest.raises(ConfigError, match=r"a build without CUDA.*pip install --force-reinstall torch=="):
        refuse_silent_cpu(1, {}, root)
    # What the build says when it is asked to start is told as it is; the driver follows from the version of CUDA.
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        ConfigError, match=r"not compiled with CUDA.*NVIDIA's driver 580 or newer.*VISIBLE_DEVICES is '9'"
    ):
        refuse_silent_cpu(1, {"CUDA_VISIBLE_DEVICES": "9"}, root)
    with pytest.raises(ConfigError, match=r"CFG-030.*cuda:0, and this node has 0 such devices that torch"):
        select("cuda")


@pytest.mark.parametrize(
    ("capability", "fits"),
    [
        ((9, 0), True),
        ((8, 9), True),
        ((12, 1), True),
        ((13, 0), True),
        ((7, 0), False),
        ((7, 5), True),
        ((10, 3), False),
    ],
)
def test_a_device_without_kernels_is_refused_at_the_start(capability: tuple[int, int], fits: bool) -> None:
    built_for = ["sm_75", "sm_80", "sm_90", "sm_100a", "sm_120", "compute_120"]
    if fits:
        require_kernels("a device", capability, built_for)
    else:
        with pytest.raises(ConfigError, match=r"CFG-182: a device has compute capability"):
            require_kernels("a device", capability, built_for)
    require_kernels("another maker's", capability, ["gfx90a", "gfx942"])


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available() or sign_of("cuda") is not None, reason="there is a device")
def test_a_job_of_two_processes_ends_before_it_begins(demo: Path) -> None:
    configs = demo / "configs"
    command = [
        *(sys.executable, "-m", "mm.cli.launch", "--nproc-per-node", "2", "--master-port", ANY_PORT),
        *("-m", "mm.cli.train", "--mm-data", str(configs / "feature_data.json"), "--init-from-scratch"),
        *(
            "--mm-model",
            str(configs / "pretrain_model.json"),
            "--train-iters",
            "1",
            "--lr",
            "1e-4",
            "--num-workers",
            "0",
        ),
    ]
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=180)
    assert ended.returncode == 64
    assert "error CFG-181: 2 processes were asked for" in ended.stderr.splitlines()[-1]
