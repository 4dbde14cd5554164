"""What `identify` says of folders and files that other programs and our own writers made, and who looks."""

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conversions import copy_of, tensors_of, training_run
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from mm.checkpoint import convert
from mm.checkpoint.comm import ProcessGroupComm
from mm.checkpoint.formats.found import Found
from mm.checkpoint.formats.table import FORMATS
from mm.checkpoint.identify import identify
from mm.checkpoint.manifest import FileRecord
from mm.checkpoint.record import WeightsRecord, write_record
from mm.checkpoint.safetensor_file import hash_file
from mm.checkpoint.store import save, whole_piece
from mm.errors import CheckpointError, MMError
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter
from mm.lora.mindspeed import write_mindspeed
from mm.wan.names import native_to_mindspeed

FILE = "diffusion_pytorch_model.safetensors"
PT = "mp_rank_00/model_optim_rng.pt"
TRAINING, MM, ZERO = "a training checkpoint", "MM weights", "a layer-zero save of MindSpeed"
TORCH, DEEPSPEED, SAFETENSORS = "a file of torch.save", "a checkpoint of DeepSpeed", "safetensors"
ADAPTER = Adapter({"blocks.0.self_attn.q": Update(torch.ones(2, 16), torch.ones(16, 2), 4.0)})
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"])


@pytest.fixture(scope="module")
def places(original, tmp_path_factory):
    """A folder with one of everything, each made by the program whose format it is where that is at hand."""
    root = tmp_path_factory.mktemp("places")
    of_models(root, original)
    of_training(root, original)
    of_mindspeed(root)
    of_adapters(root)
    of_encoders(root)
    of_nothing(root)
    return root


def of_models(root, original):
    shutil.copytree(original, root / "hf")
    shutil.copytree(original, root / "pipeline" / "transformer")
    shutil.copytree(original, root / "hf in place")
    convert.convert_to_native(original, root / "native")
    narrow = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(root / "native" / FILE).items()}
    scale = {"blocks.0.self_attn.q.scale_weight": torch.ones(1)}
    save_file(
        {f"model.diffusion_model.{name}": value for name, value in (narrow | scale).items()}, root / "fp8.safetensors"
    )
    shutil.copytree(original, root / "hf with adapter")
    write_adapter(root / "hf with adapter" / "pytorch_lora_weights.safetensors", ADAPTER, "peft")


def of_training(root, original):
    training_run(original, root / "run")
    names = [f"{module}.{half}" for module in ADAPTER.updates for half in ("lora_A", "lora_B")]
    pieces = [whole_piece(f"model.{name}", torch.ones(2, 16)) for name in names]
    save(root / "lora run", 3, pieces, {"adapters": {"adapted": {"blocks.0.self_attn.q": [2, 4.0]}}})
    convert.convert_to_mm(original, root / "hf in place", None)


def of_mindspeed(root):
    convert.convert_to_mm(root / "native", root / "mm")
    convert.convert_to_mm(root / "native", root / "stages", ((1, 1),))
    write_mindspeed(root / "mm adapters", ADAPTER)
    for name in ("theirs", "torch run"):
        folder = root / name / "iter_0005000"
        shutil.copytree(root / "mm" / "release", folder)
        (root / name / "latest_checkpointed_iteration.txt").write_text("5000")
    file = folder / PT
    record = FileRecord(num_bytes=file.stat().st_size, sha256=hash_file(file))
    progress = {"step": 5000, "consumed_samples": 1, "skipped_steps": 0, "replaced_samples": 0, "seed": 1}
    write_record(folder, WeightsRecord(**progress, versions={}, files={PT: record}))
    native = load_file(root / "native" / FILE)
    state = {f"predictor.{native_to_mindspeed(name)}": value for name, value in native.items()}
    for step in (400, 700):
        saved = root / "zero" / f"iter_{step:07d}"
        saved.mkdir(parents=True)
        for rank in range(2):
            content = {"model": state, "shard_state_dict": {}, "parallel_state": {"global_rank": rank}}
            torch.save(content, saved / f"model_{rank}.pt")
    (root / "deepspeed").mkdir()
    (root / "deepspeed" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")


def of_adapters(root):
    tiny = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "ffn_dim": 24,
        "text_dim": 12,
        "freq_dim": 8,
    }
    model = WanTransformer3DModel(**tiny)
    model.add_adapter(LORA)
    model.save_lora_adapter(root / "diffusers lora")
    get_peft_model(WanTransformer3DModel(**tiny), LORA).save_pretrained(root / "peft lora")
    (root / "both").mkdir()
    write_adapter(root / "both" / "pytorch_lora_weights.safetensors", ADAPTER, "peft")
    write_adapter(root / "both" / "lora_comfyui.safetensors", ADAPTER, "comfyui")
    shutil.copy(root / "both" / "lora_comfyui.safetensors", root / "comfyui.safetensors")
    halves = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2), "alpha": torch.tensor(4.0)}
    save_file({f"lora_unet_blocks_0_self_attn_q.{half}": v for half, v in halves.items()}, root / "kohya.safetensors")
    save_file({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, root / "lokr.safetensors")


def of_encoders(root):
    vae = AutoencoderKLWan(base_dim=8, z_dim=4)
    vae.save_pretrained(root / "vae")
    convert.convert_to_native(root / "vae", root / "vae original")
    torch.save(load_file(root / "vae original" / "Wan2.1_VAE.safetensors"), root / "Wan2.1_VAE.pth")
    torch.save({"x": torch.ones(1)}, root / "other.pth")
    (root / "damaged.pth").write_bytes(b"x")


def of_nothing(root):
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("x")
    save_file({"x": torch.ones(1)}, root / "strange.safetensors")


DIFFUSERS, NATIVE = "diffusers names", "native names"
CASES = {  # the path: format, content, names, what is read, step, whether it is a run's folder
    "hf": (SAFETENSORS, "model", DIFFUSERS, "hf", None, False),
    "hf with adapter": (SAFETENSORS, "model", DIFFUSERS, "hf with adapter", None, False),
    "pipeline": ("pipeline", "unknown", "", "pipeline", None, False),
    "pipeline/transformer": (SAFETENSORS, "model", DIFFUSERS, "pipeline/transformer", None, False),
    "native": (SAFETENSORS, "model", NATIVE, "native", None, False),
    f"native/{FILE}": (SAFETENSORS, "model", NATIVE, f"native/{FILE}", None, False),
    "fp8.safetensors": (SAFETENSORS, "model", NATIVE, "fp8.safetensors", None, False),
    "run": (TRAINING, "model", "", "run/iter_0000010", 10, True),
    "run/iter_0000010": (TRAINING, "model", "", "run/iter_0000010", 10, False),
    "lora run": (TRAINING, "adapters", "", "lora run/iter_0000003", 3, True),
    "torch run": (MM, "model", "", "torch run/iter_0005000", 5000, True),
    "theirs": (MM, "model", "", "theirs/iter_0005000", 5000, False),
    "mm": (MM, "model", "", "mm/release", None, False),
    "mm/release": (MM, "model", "", "mm/release", None, False),
    "hf in place": (MM, "model", "", "hf in place/release", None, False),
    "stages": (MM, "model", "", "stages/release", None, False),
    "mm adapters": (MM, "adapters", "", "mm adapters/release", None, False),
    "zero": (ZERO, "model", "", "zero/iter_0000700", 700, False),
    "zero/iter_0000400": (ZERO, "model", "", "zero/iter_0000400", 400, False),
    "deepspeed": (DEEPSPEED, "unknown", "", "deepspeed", None, False),
    "diffusers lora": (SAFETENSORS, "adapters", DIFFUSERS, "diffusers lora", None, False),
    "peft lora": (SAFETENSORS, "adapters", DIFFUSERS, "peft lora", None, False),
    "both": (SAFETENSORS, "adapters", DIFFUSERS, "both", None, False),
    "comfyui.safetensors": (SAFETENSORS, "adapters", NATIVE, "comfyui.safetensors", None, False),
    "kohya.safetensors": (SAFETENSORS, "adapters", "native names with underscores", "kohya.safetensors", None, False),
    "lokr.safetensors": (SAFETENSORS, "adapters", "LoKr", "lokr.safetensors", None, False),
    "vae": (SAFETENSORS, "encoder", "the video VAE", "vae", None, False),
    "vae original": (SAFETENSORS, "encoder", "the video VAE", "vae original", None, False),
    "Wan2.1_VAE.pth": (TORCH, "encoder", "the video VAE", "Wan2.1_VAE.pth", None, False),
    "other.pth": (TORCH, "unknown", "", "other.pth", None, False),
    "damaged.pth": (TORCH, "unknown", "", "damaged.pth", None, False),
    "strange.safetensors": (SAFETENSORS, "unknown", "", "strange.safetensors", None, False),
    "notes.txt": ("file", "unknown", "", "notes.txt", None, False),
    "empty": ("folder", "unknown", "", "empty", None, False),
    "nowhere": ("absent", "unknown", "", "nowhere", None, False),
}


@pytest.mark.parametrize("place", CASES)
def test_what_is_said(places, place):
    found = identify(places / place)
    said = found.format, found.content, found.names, str(found.path.relative_to(places)), found.step, found.of_run
    assert said == CASES[place]
    assert found.asked == places / place
    assert Found.parse(json.loads(json.dumps(found.as_json()))) == found, "as the other ranks get it"


def test_every_row_of_the_table_is_asked_about():
    assert {row.name for row in FORMATS} <= {case[0] for case in CASES.values()}


def test_what_readers_are_given(places, original):
    header = identify(places / "hf").headers
    assert {file.name for file in header} == {file.name for file in original.glob("*.safetensors")}
    kinds = {name: tuple(info.shape) for part in header.values() for name, info in part.items()}
    assert kinds == {name: tuple(value.shape) for name, value in tensors_of(original).items()}
    assert identify(places / "stages").files == tuple(f"mp_rank_00_00{rank}/model_optim_rng.pt" for rank in (0, 1))
    assert identify(places / "zero").files == ("model_0.pt", "model_1.pt")


def test_an_adapter_beside_a_model_is_found_by_whoever_wants_one(places):
    folder = places / "hf with adapter"
    found = identify(folder, wanted="adapters")
    assert (found.content, list(found.headers)) == ("adapters", [folder / "pytorch_lora_weights.safetensors"])
    assert folder / "pytorch_lora_weights.safetensors" not in identify(folder).headers


def test_copies_of_an_adapter_for_several_tools_are_one(places):
    assert list(identify(places / "both").headers) == [places / "both" / "pytorch_lora_weights.safetensors"]


def on_two_nodes(home: str) -> list[str]:
    """What a rank is told of folders that each sees from a place of its own."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    comm, told = ProcessGroupComm(), []
    for owner in (0, 1):
        os.chdir(Path(home, "node" if comm.rank == owner else "another"))
        for folder in ("weights", "run"):
            try:
                told.append(identify(folder, comm).format)
            except MMError as error:
                told.append(str(error))
    dist.destroy_process_group()
    return told


def test_a_folder_that_one_node_has_is_told_on_all(original, tmp_path):
    """A relative path leads each process where it is. Rank 0 has the folder first, then rank 1."""
    (tmp_path / "node").mkdir()
    (tmp_path / "another").mkdir()
    copy_of(original, tmp_path / "node" / "weights")
    training_run(original, tmp_path / "node" / "run")
    first, second = run_ranks(2, on_two_nodes, str(tmp_path))
    assert first == second
    assert first[0].startswith("DATA-020: Weights not found: weights does not exist on ")
    assert first[1].startswith("CKPT-012: The checkpoint run/iter_0000010 is not complete: it does not exist on ")
    assert first[2:] == ["absent", "absent"]


def test_a_run_s_newest_whole_checkpoint_is_meant_in_the_mm_format_too(places, tmp_path, caplog):
    """For conversion as for training, which would go on from it."""
    folder = Path(shutil.copytree(places / "torch run", tmp_path / "run"))
    shutil.copytree(folder / "iter_0005000", folder / "iter_0006000")
    (folder / "latest_checkpointed_iteration.txt").write_text("6000")
    os.truncate(folder / "iter_0006000" / PT, 100)
    found = identify(folder)
    assert (found.path.name, found.step) == ("iter_0005000", 5000)
    assert "iter_0006000 is not complete" in caplog.text
    with pytest.raises(CheckpointError, match="CKPT-012"):
        identify(folder / "iter_0006000")
    with pytest.raises(CheckpointError, match="CKPT-013"):
        identify(folder, policy="strict")
