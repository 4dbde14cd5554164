"""The embedded default is complete, loads offline with diffusers and transformers, and is never half there."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from extracted import extract
from mindspeed_alone import load_generation
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mm.cli import doctor_data
from mm.cli.demo import main
from mm.config.base import load
from mm.demo import write
from mm.demo.clips import all_captions, all_clips
from mm.demo.components import MODEL_NAMES, load_vae
from mm.demo.measure import measure_clip, score
from mm.demo.video import read_video
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.errors import ConfigError
from mm.generate.rows import read_rows
from mm.wan.folder import WeightFolder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "workspace"
    main(["--out", str(out)])
    return out


def test_every_stage_takes_a_folder_of_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    home = tmp_path / 'run 1, "final" #[2]=é '
    main(["--out", str(home)])
    configs = home / "configs"
    extract(configs)
    data, model = configs / "feature_data.json", configs / "pretrain_model.json"
    doctor_data.main(["--mm-data", str(data), "--mm-model", str(model), "--num-workers", "1"])
    assert "16 samples, all of them can be used" in capsys.readouterr().out
    of_other = {"fun_control": 0, "fun_control_ref": 0, "fun_camera": 1, "vace": 0, "wan22_i2v": 1}
    for task, images in {"i2v": 1, "flf2v": 2, "speedcontrol": 0, **of_other}.items():
        rows, bad = read_rows(load_generation(GenerateFlags(mm_model=str(configs / task / "inference_model.json"))))
        assert len(rows) == 16 and not bad
        assert all(
            len(row.paths("images")) == images and all(path.is_file() for path in row.paths("images")) for row in rows
        )
        asked = json.loads((configs / task / "inference_model.json").read_text())
        for name in asked.keys() & {"control", "reference", "mask", "camera", "video"}:
            listed = [row.paths(f"{name}s") for row in rows]
            assert all(len(paths) == 1 and paths[0].is_file() for paths in listed), (task, name)


@pytest.mark.parametrize("name", ["two\nlines", "cr\rname"])
def test_a_folder_that_no_list_can_name_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="CFG-130"):
        main(["--out", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def pipeline(demo: Path) -> WanPipeline:
    """The whole folder by its model_index.json; diffusers wants accelerate to read this one class, so read it here."""
    folder = demo / "weights" / MODEL_NAMES["t2v"]
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / "transformer"))
    transformer.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    return WanPipeline.from_pretrained(folder, transformer=transformer, local_files_only=True)


def test_data_json_lists_clips_that_are_there_and_show_their_caption(demo: Path):
    rows = json.loads((demo / "dataset" / "data.json").read_text())
    assert [row["cap"] for row in rows] == all_captions()
    for row, clip in zip(rows, all_clips(), strict=True):
        assert set(row) == {"path", "cap", "num_frames", "fps", "resolution"}
        frames = read_video(demo / "dataset" / row["path"])
        assert frames.shape == (row["num_frames"], row["resolution"]["height"], row["resolution"]["width"], 3)
        assert measure_clip(frames) == (clip.colour, clip.direction)
    assert score(demo / "dataset" / "videos", [row["cap"] for row in rows])[:2] == (16, 16)
    assert (demo / "prompts.txt").read_text().splitlines() == all_captions()


def test_wan_pipeline_loads_the_folder_and_generates(pipeline: WanPipeline):
    video = pipeline(
        all_captions()[0],
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert video.shape == (1, 9, 3, 64, 64)
    assert torch.isfinite(video).all()
    assert pipeline.scheduler.config.flow_shift == 3.0
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_model_and_dataset_are_the_same_every_time(demo: Path, tmp_path: Path):
    main(["--out", str(tmp_path / "again")])

    def digests(folder: Path) -> dict[str, str]:
        files = [p for part in ("weights", "dataset") for p in (folder / part).rglob("*") if p.is_file()]
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert digests(tmp_path / "again") == digests(demo)


def test_captions_have_clearly_different_embeddings_of_unit_size(pipeline: WanPipeline):
    tokens = pipeline.tokenizer(all_captions(), return_tensors="pt")
    with torch.no_grad():
        states = pipeline.text_encoder(**tokens).last_hidden_state
    assert 0.5 < float(states.std()) < 2
    flat = states.flatten(1)
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5 + 10 * torch.eye(16)
    assert float(distances.min()) > 0.3  # root mean square a feature, beside features of size 1


def test_tokenizer_knows_the_captions_and_takes_any_text(demo: Path):
    tokenizer = AutoTokenizer.from_pretrained(
        demo / "weights" / MODEL_NAMES["t2v"] / "tokenizer", local_files_only=True
    )
    assert (tokenizer.pad_token_id, tokenizer.eos_token, tokenizer.unk_token_id) == (0, "</s>", 2)
    words = tokenizer.convert_ids_to_tokens(tokenizer("a red circle moving left").input_ids)
    assert words == ["▁a", "▁red", "▁circle", "▁moving", "▁left", "</s>"]
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    printable = tokenizer("Every banana costs 3.50$, (really)!").input_ids
    assert tokenizer.unk_token_id not in printable
    for text in ["色调艳丽，过曝", "Ein Hund läuft! 3.5€", "\x00\n\t 🙂", "reddish"]:
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert max(ids) < len(tokenizer)


def test_the_folder_of_ti2v_is_complete_for_diffusers(demo: Path):
    folder = demo / "weights" / MODEL_NAMES["ti2v"]
    for part, kind in (("transformer", WanTransformer3DModel), ("vae", AutoencoderKLWan)):
        _, info = kind.from_pretrained(folder / part, output_loading_info=True, local_files_only=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    assert pipeline.config.expand_timesteps is True and pipeline.vae_scale_factor_spatial == 16
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a red circle moving left", height=64, width=64, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
        output_type="pt", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert frames.shape == (1, 9, 3, 64, 64) and torch.isfinite(frames).all()
    predictor = load(PretrainModel, demo / "configs/ti2v/pretrain_model.json").predictor.wan()
    weights = WeightFolder.open(folder / "transformer").config()
    assert weights is not None and not predictor.differing_fields(weights)


@pytest.mark.parametrize(("stride", "name", "channels"), [(8, "tiny_vae", 16), (16, "tiny_vae_16", 48)])
def test_vae_asset_is_small_and_reproduces_clips(stride: int, name: str, channels: int):
    assets = Path(write.__file__).parent / "assets"
    assert sum(p.stat().st_size for p in assets.glob(f"{name}.*")) <= 2_000_000
    vae = load_vae(stride)
    shown = np.stack([clip.draw() for clip in all_clips()])
    x = torch.from_numpy(shown).permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
        decoded = vae.decode(latents).sample
    assert latents.shape == (16, channels, 3, 64 // stride, 64 // stride)
    assert float((decoded - x).square().mean()) < 0.003
    pictures = ((decoded.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    for clip, frames in zip(all_clips(), pictures, strict=True):
        assert measure_clip(frames) == (clip.colour, clip.direction), clip
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    normalised = (latents - mean) / std
    assert normalised.mean((0, 2, 3, 4)).abs().max() < 0.1
    assert (normalised.std((0, 2, 3, 4)) - 1).abs().max() < 0.1


def test_existing_output_is_refused_and_untouched(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"CFG-080.*out"):
        main(["--out", str(tmp_path / "out")])
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"CFG-080"):
        main(["--out", str(tmp_path / "file")])


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_video", full_disk)
    with pytest.raises(ConfigError, match=r"CFG-081.*No space left"):
        main(["--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_more_clips_a_caption(tmp_path: Path):
    write._write_dataset(tmp_path / "dataset", 3)
    rows = json.loads((tmp_path / "dataset" / "data.json").read_text())
    assert len(rows) == 48 == len(list((tmp_path / "dataset" / "videos").iterdir()))
    assert {captions: sum(r["cap"] == captions for r in rows) for captions in all_captions()} == dict.fromkeys(
        all_captions(), 3
    )
