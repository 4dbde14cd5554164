"""Speed control against DiffSynth-Studio's numbers and published layout; its weights in every format."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from published_names import key_shape_md5
from safetensors.torch import load_file, save_file

from mm.checkpoint.formats import hf, mindspeed, native
from mm.checkpoint.formats.folder import FolderWeights
from mm.checkpoint.safetensor_file import Entry
from mm.checkpoint.weights import open_weights
from mm.config.model import WAN_1_3B, WanConfig, of_task
from mm.config.tasks.registry import TASKS
from mm.errors import ConfigError
from mm.wan.folder import WeightFolder
from mm.wan.model import WanModel
from mm.wan.precision import keep_fp32

SPEEDCONTROL = TASKS["speedcontrol"]
T2V = WanConfig(text_dim=24, hidden_size=128, ffn_dim=96, num_heads=1, num_layers=2, freq_dim=32)
TINY = of_task(T2V, SPEEDCONTROL)


def relative(value: torch.Tensor, expected: torch.Tensor, least: float = 1e-8) -> float:
    return float((value - expected).abs().max() / max(float(expected.abs().max()), least))


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    """The tensors of DiffSynth's model, where the machine has them."""
    folder = os.environ.get("MM_ORACLES")
    if not folder:
        pytest.skip("MM_ORACLES is not set; it names the folder of numbers of other systems")
    return load_file(Path(folder) / "speedcontrol.diffsynth.safetensors")


def of_oracle(oracle: dict[str, torch.Tensor], task: str) -> WanModel:
    shape = WanConfig(
        text_dim=24, text_len=16, hidden_size=64, ffn_dim=56, num_heads=2, num_layers=2, freq_dim=32
    )  # fmt: skip
    model = WanModel(of_task(shape, TASKS[task]))
    weights = {name.removeprefix("weights."): value.float() for name, value in oracle.items() if "weights." in name}
    model.load_state_dict({n: v for n, v in weights.items() if task != "t2v" or "motion_controller" not in n})
    return model


def inputs(oracle: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [oracle[f"input.{name}"] for name in ("latents", "timestep", "text")]


def test_velocity_and_every_gradient_are_those_of_diffsynth(oracle: dict[str, torch.Tensor]) -> None:
    model = of_oracle(oracle, "speedcontrol")
    velocity = model.velocity(*inputs(oracle), motion_bucket_id=oracle["input.motion_bucket_id"])
    assert relative(velocity, oracle["output.velocity"]) <= 5e-6

    (velocity * oracle["cotangent"]).sum().backward()
    theirs = {name.removeprefix("grad."): value for name, value in oracle.items() if name.startswith("grad.")}
    least = 1e-3 * max(float(value.abs().max()) for value in theirs.values())  # biases of keys have almost none
    errors = {name: relative(p.grad, theirs.pop(name), least) for name, p in model.named_parameters()}
    assert not theirs, "gradients of parameters that are not here"
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])


def test_without_a_speed_it_is_the_model_of_text_to_video(oracle: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        velocity = of_oracle(oracle, "t2v").velocity(*inputs(oracle))
    assert relative(velocity, oracle["case.no_motion.output.velocity"]) <= 5e-6


def test_the_controller_has_the_published_layout() -> None:
    with torch.device("meta"):
        named = dict(WanModel(of_task(WAN_1_3B, SPEEDCONTROL)).named_parameters())
    own = {n.removeprefix("motion_controller."): tuple(p.shape) for n, p in named.items() if "motion_controller" in n}
    assert key_shape_md5(own) == "dbd5ec76bbf977983f972c151d545389"
    assert sum(p.numel() for n, p in named.items() if "motion_controller" in n) == 16_920_576
    assert all(keep_fp32(f"motion_controller.{name}") for name in own)


def test_a_new_controller_changes_no_bit_and_learns() -> None:
    text_to_video, model = WanModel(T2V), WanModel(TINY)
    text_to_video.init_weights(3)
    model.init_weights(3)
    for each in (text_to_video, model):
        with torch.no_grad():
            each.head.head.weight.copy_(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    given = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 24)
    velocity = model.velocity(*given, motion_bucket_id=torch.tensor([70.0]))
    assert torch.equal(velocity, text_to_video.velocity(*given))
    velocity.square().sum().backward()
    gradients = {name: p.grad for name, p in model.motion_controller.named_parameters()}
    assert gradients["linear.4.weight"].any() and not gradients["linear.0.weight"].any()


@pytest.mark.parametrize(
    ("config", "features", "id"),
    [
        (TINY, {"motion_bucket_id": torch.zeros(3)}, "CFG-195"),
        (TINY, {"motion_bucket_id": torch.zeros(2, 1)}, "CFG-195"),
        (TINY, {"motion_bucket_id": torch.zeros(2), "condition": torch.zeros(2, 20, 2, 4, 4)}, "CFG-057"),
        (T2V, {"motion_bucket_id": torch.zeros(2)}, "CFG-057"),
    ],
)
def test_speeds_that_do_not_fit_are_refused(config: WanConfig, features: dict[str, torch.Tensor], id: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WanModel(config).velocity(torch.zeros(2, 16, 2, 4, 4), torch.zeros(2), torch.zeros(2, 5, 24), **features)
    assert caught.value.id == id


@pytest.fixture
def model() -> WanModel:
    found = WanModel(TINY)
    found.init_weights(0)
    with torch.no_grad():
        found.get_parameter("motion_controller.linear.4.weight").fill_(0.25)
    return found


def entries(model: WanModel) -> list[Entry]:
    return [
        Entry(name, torch.float32, tuple(p.shape), lambda p=p: p.detach())  # type: ignore[misc]
        for name, p in model.named_parameters()
    ]


def assert_reads(path: Path, model: WanModel) -> None:
    """The same model is there, and nothing else."""
    source = open_weights(path)
    assert source.config() == TINY and source.shapes().keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(source.read(name), p) for name, p in model.named_parameters())


def test_weights_come_back_from_every_format(model: WanModel, tmp_path: Path) -> None:
    for form in ("hf", "native", "mm/release"):
        (tmp_path / form).mkdir(parents=True)
    hf.write_new_folder(tmp_path / "hf", entries(model), TINY, max_bytes=10**9)
    native.write_native(tmp_path / "native", entries(model), TINY)
    source = FolderWeights(WeightFolder.open(tmp_path / "native"))
    names = [name for name, _ in model.named_parameters()]
    mindspeed.write_release(tmp_path / "mm" / "release", source, names, ((1, 1),))
    (tmp_path / "mm" / mindspeed.CONFIG_NAME).write_text(TINY.model_dump_json())
    for form in ("hf", "native", "mm/release"):
        assert_reads(tmp_path / form, model)


def test_diffusers_loads_its_folder_without_the_controller(model: WanModel, tmp_path: Path) -> None:
    hf.write_new_folder(tmp_path, entries(model), TINY, max_bytes=10**9)
    theirs, about = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"] and not about["mismatched_keys"]
    assert {name.split(".")[0] for name in about["unexpected_keys"]} == {"motion_controller"}
    given = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 512, 24)
    text_to_video = WanModel(T2V)
    text_to_video.load_state_dict({n: p for n, p in model.state_dict().items() if "motion_controller" not in n})
    with torch.no_grad():
        assert relative(text_to_video.velocity(*given), theirs(*given).sample) <= 1e-5


def test_the_released_file_beside_a_base_model_makes_one(model: WanModel, tmp_path: Path) -> None:
    """As docs/tasks.md shows it; the task is told by the tensors alone."""
    state = model.state_dict()
    base = {name: value for name, value in state.items() if "motion_controller" not in name}
    released = {n.removeprefix("motion_controller."): v for n, v in state.items() if "motion_controller" in n}
    together = base | {f"motion_controller.{name}": value for name, value in released.items()}
    save_file(together, tmp_path / "speedcontrol.safetensors")
    assert_reads(tmp_path / "speedcontrol.safetensors", model)
