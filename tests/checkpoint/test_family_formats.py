"""Models of every task through every format: the same bits and configuration, and what diffusers makes of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import as_native, assert_same_bits, flags
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import save_file

from mm.checkpoint import convert
from mm.checkpoint.formats import native
from mm.checkpoint.safetensor_file import entry_of
from mm.checkpoint.store import save, whole_piece
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig, of_task
from mm.config.tasks.registry import TASKS
from mm.lora.inspection import inspect
from mm.wan.model import WanModel, whole_shapes
from mm.wan.precision import keep_fp32

BASE = WanConfig(text_dim=24, hidden_size=256, ffn_dim=96, num_heads=2, num_layers=4, freq_dim=32)
SIZES = {"img_dim": 40, "vace_layers": (0, 2)}
IN_DIFFUSERS = ["t2v", "i2v", "flf2v", "fun_control", "wan22_i2v", "ti2v", "vace"]
"""Tasks whose models are, tensor for tensor, those of a class of diffusers'."""


def of(task: str, base: WanConfig = BASE) -> WanConfig:
    """A small model of a task."""
    declared = TASKS[task]
    sizes = {name: SIZES[name] for name in declared.sizes if name in SIZES}
    channels = declared.latent_channels or 16
    return of_task(base.model_copy(update={"in_dim": channels, "out_dim": channels}), declared, **sizes)


def random_state(config: WanConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """No value by which two tensors could be taken for each other."""
    random = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=random) / 8).to(torch.float32 if keep_fp32(name) else dtype)
        for name, shape in whole_shapes(config).items()
    }


def native_folder(folder: Path, config: WanConfig, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    native.write_native(folder, [entry_of(name, value) for name, value in state.items()], config)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_every_format_and_back(task: str, tmp_path: Path) -> None:
    config = of(task)
    state = random_state(config)
    folders = {"native": native_folder(tmp_path / "native", config, state)}
    for name, source, action in (
        ("hf", "native", convert.convert_to_hf),
        ("mm", "hf", convert.convert_to_mm),
        ("stages", "mm", lambda source, target: convert.convert_to_mm(source, target, ((1, 1), (1, 1)))),
        ("hf again", "stages", lambda source, target: convert.convert_to_hf(source, target, None, 100_000)),
        ("native again", "hf again", convert.convert_to_native),
    ):
        folders[name] = tmp_path / name
        action(folders[source], folders[name])
    for name, folder in folders.items():
        assert_same_bits(as_native(folder), state)
        assert open_weights(folder).config() == config, name
        found, problem = inspect(folder)
        assert problem is None, name
        assert found.model == f"{task}, width 256, 4 blocks, 2 heads"
    for file in folders["native"].iterdir():
        assert (folders["native again"] / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_a_training_checkpoint_and_back(task: str, tmp_path: Path) -> None:
    config = of(task)
    state = random_state(config, torch.float32)
    pieces = [whole_piece(f"model.{name}", tensor) for name, tensor in state.items()]
    save(tmp_path / "run", 10, pieces, {"step": 10, "wan_config": config.model_dump(mode="json")})
    for name, action in (
        ("hf", convert.convert_to_hf), ("native", convert.convert_to_native), ("mm", convert.convert_to_mm)
    ):  # fmt: skip
        action(tmp_path / "run", tmp_path / name)
        assert_same_bits(as_native(tmp_path / name), state)
        assert open_weights(tmp_path / name).config() == config


def loadable(cls: Any) -> Any:
    """diffusers wants the package accelerate for modules kept in fp32; files and names are read as ever."""
    return type(cls.__name__, (cls,), {"_keep_in_fp32_modules": None})


@pytest.mark.parametrize("task", IN_DIFFUSERS)
def test_diffusers_loads_what_is_written_and_computes_the_same(task: str, tmp_path: Path) -> None:
    config = of(task)
    state = random_state(config, torch.float32)
    convert.convert_to_hf(native_folder(tmp_path / "native", config, state), tmp_path / "hf")
    cls = WanVACETransformer3DModel if task == "vace" else WanTransformer3DModel
    theirs, info = loadable(cls).from_pretrained(tmp_path / "hf", output_loading_info=True, low_cpu_mem_usage=False)
    # A norm that diffusers makes for models of images and does not call.
    info["missing_keys"] = [name for name in info["missing_keys"] if not name.endswith("norm_added_q.weight")]
    assert not any(info.values()), info

    size, text = (2, 4, 6), torch.randn(1, 512, 24)  # diffusers takes the last 512 tokens for text
    features = {name: torch.randn(1, *shape) for name, shape in config.feature_shapes(size).items()}
    features.pop("vace_scale", None)
    noisy = torch.randn(1, config.noise_channels, *size)
    own = WanModel(config)
    own.load_state_dict(state)
    more: dict[str, torch.Tensor] = {}
    if "vace_context" in features:
        more = {"control_hidden_states": features["vace_context"], "control_hidden_states_scale": torch.ones(2)}
    if "image_features" in features:
        more = {"encoder_hidden_states_image": features["image_features"].reshape(-1, 257, 40)}  # a row for each image
    timestep = torch.tensor([637.0])
    with torch.no_grad():
        latents = torch.cat([noisy, *(features[name] for name in ("condition",) if name in features)], 1)
        expected = theirs(latents, timestep, text, return_dict=False, **more)[0]
        found = own.velocity(noisy, timestep, text, **features)
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_a_native_file_without_a_configuration_is_known_by_its_tensors(tmp_path: Path) -> None:
    for task in ("fun_control_ref", "fun_camera", "vace"):
        save_file(random_state(of(task)), tmp_path / f"{task}.safetensors")
        found, problem = inspect(tmp_path / f"{task}.safetensors")
        assert (found.model.split(",")[0], problem) == (task, None)


# Made wider.


def features_of_zeros(config: WanConfig, size: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1, *shape) for name, shape in config.feature_shapes(size).items()}


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("t2v", "i2v"),
        ("t2v", "fun_control"),
        ("t2v", "fun_control_ref"),
        ("t2v", "fun_camera"),
        ("t2v", "wan22_i2v"),
        ("t2v", "speedcontrol"),
        ("i2v", "fun_control"),
        ("i2v", "fun_control_ref"),
        ("fun_control", "fun_control_ref"),
    ],
)
def test_a_wider_model_begins_as_the_one_it_was_made_of(source: str, task: str, tmp_path: Path) -> None:
    """With nothing given where it is wider, its velocity is the same."""
    config, size = of(source), (2, 4, 6)
    state = random_state(config, torch.float32)
    made_of = native_folder(tmp_path / "source", config, state)
    words = ("--mode", "widen", "--task", task, "--source_path", made_of, "--target_path", tmp_path / "wide")
    assert flags(*words) == 0

    wide = open_weights(tmp_path / "wide").config()
    released = {"img_dim": 1280} if config.img_dim is None and of(task).img_dim else {}
    assert wide is not None and wide == of(task).model_copy(update=released)
    found = as_native(tmp_path / "wide")
    narrow = state["patch_embedding.weight"]
    assert torch.equal(found["patch_embedding.weight"][:, : narrow.shape[1]], narrow)
    assert not found["patch_embedding.weight"][:, narrow.shape[1] :].any()
    assert_same_bits({n: v for n, v in found.items() if n in state and n != "patch_embedding.weight"},
                     {n: v for n, v in state.items() if n != "patch_embedding.weight"})  # fmt: skip

    torch.manual_seed(0)
    noisy, text, timestep = torch.randn(1, 16, *size), torch.randn(1, 6, 24), torch.tensor([637.0])
    images = {"image_features": torch.randn(1, 257, 40)} if config.image_tokens else {}
    models = []
    for shape, weights in ((config, state), (wide, found)):
        model = WanModel(shape)
        model.load_state_dict(weights)
        features = features_of_zeros(shape, size) | images
        features.pop("reference_latents", None)  # a model that has them may be called without
        with torch.no_grad():
            models.append(model.velocity(noisy, timestep, text, **features))
    assert (models[0] - models[1]).abs().max() <= 1e-6 * models[0].abs().max()


def test_what_is_new_is_said_and_is_a_function_of_the_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_of = native_folder(tmp_path / "source", of("i2v"), random_state(of("i2v")))
    states = []
    for name, seed in (("a", ()), ("b", ("--seed", 1234)), ("c", ("--seed", 1))):
        words = ("--mode", "widen", "--task", "fun_control_ref", "--source_path", made_of, "--to", "hf", *seed)
        with caplog.at_level("INFO"):
            assert flags(*words, "--target_path", tmp_path / name) == 0
        states.append(as_native(tmp_path / name))
    assert "patch_embedding has 48 input channels in place of 36; the new ones are zero" in caplog.text
    assert "channels 16 to 35 keep what i2v models have learned" in caplog.text
    assert "2 tensors are new, with initial values of seed 1234: ref_conv (2)" in caplog.text
    assert_same_bits(states[0], states[1])
    assert not torch.equal(states[0]["ref_conv.weight"], states[2]["ref_conv.weight"])
    assert states[0]["ref_conv.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("source", "task", "said"),
    [
        ("t2v", "t2w", ["CFG-300", "fun_control"]),
        ("t2v", "vace", ["CFG-300", "vace"]),
        ("fun_control", "fun_control", ["CKPT-130", "it is one"]),
        ("fun_control", "i2v", ["CKPT-130", "patch_embedding.weight"]),
        ("i2v", "wan22_i2v", ["CKPT-130", "img_emb"]),
        ("flf2v", "fun_control", ["CKPT-130", "img_emb.emb_pos"]),
        ("ti2v", "fun_control", ["CKPT-130"]),
    ],
)
def test_what_cannot_be_made_wider_is_refused(
    source: str, task: str, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_of = native_folder(tmp_path / "source", of(source), random_state(of(source)))
    words = ("--mode", "widen", "--task", task, "--source_path", made_of, "--target_path", tmp_path / "wide")
    assert flags(*words) in (64, 74)
    error = capsys.readouterr().err
    assert all(part in error for part in said), error
    assert not (tmp_path / "wide").exists()
