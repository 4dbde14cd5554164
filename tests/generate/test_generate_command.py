"""The whole command on the embedded default's tiny model, against diffusers' WanPipeline on the same folder."""

import io
import json
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from generation_runs import GUIDANCE, NEGATIVE, PROMPTS, SEED, SHIFT, SIZE, STEPS, contents, generate, settings
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel
from wans_grids import UniPCOnWansGrid

from mm.checkpoint.store import save, whole_piece, writing
from mm.checkpoint.weights import open_weights
from mm.cli.generate import main
from mm.errors import DataError
from mm.generate.pipeline import initial_latents
from mm.generate.weights import with_adapters
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter
from mm.wan.model import WanModel


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_clips_are_those_of_diffusers(workplace, weights, frames, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    generate(weights)
    assert "9/9" in terminal.getvalue()  # the progress bar, which only a terminal gets, ends at prompts x steps
    # from_pretrained of this class wants the package accelerate, which nothing else here needs
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(weights / "transformer"))
    transformer.load_state_dict(load_file(weights / "transformer/diffusion_pytorch_model.safetensors"))
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(weights / "tokenizer", trust_remote_code=False),
        text_encoder=UMT5EncoderModel.from_pretrained(weights / "text_encoder"),
        transformer=transformer.eval(),
        vae=AutoencoderKLWan.from_pretrained(weights / "vae"),
        scheduler=UniPCOnWansGrid.from_pretrained(weights / "scheduler"),
    )
    assert pipeline.scheduler.config.flow_shift == SHIFT
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_latents(SEED, range(len(PROMPTS)), (16, 3, 4, 6))
    for index, prompt in enumerate(PROMPTS):
        expected = pipeline(
            prompt=prompt,
            negative_prompt=NEGATIVE,
            height=SIZE[1],
            width=SIZE[2],
            num_frames=SIZE[0],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=noise[index : index + 1].clone(),
            output_type="np",
        ).frames[0]
        ours = frames[f"video_{index:04d}.mp4"]
        assert ours.shape == expected.shape == (*SIZE, 3)
        assert np.abs(ours - 255 * expected).max() < 0.6  # half of it is the rounding to whole numbers
        assert expected.std() > 0.01  # a picture, not a flat area
        with av.open(f"clips/video_{index:04d}.mp4") as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert decoded.shape == ours.shape
        assert np.abs(decoded.astype(float) - ours).mean() < 8  # what H.264 with halved colours loses


def test_description_overwriting_and_repetition(workplace, weights, capfd):
    generate(weights, "--no-progress-bar")
    first = contents("clips")
    assert sorted(first) == sorted(f"video_{index:04d}.{end}" for index in range(3) for end in ("mp4", "json"))
    description = json.loads(first["video_0001.json"])
    assert description["prompt"] == PROMPTS[1]
    assert (description["prompt_index"], description["seed"], description["input_size"]) == (1, SEED, SIZE)
    assert (description["sample_solver"], description["num_inference_steps"]) == ("unipc", STEPS)
    assert (description["flow_shift"], description["guidance_scale"]) == (SHIFT, GUIDANCE)
    assert description["negative_prompt"] == NEGATIVE
    model = WanModel.from_pretrained(weights / "transformer")
    alone = with_adapters(open_weights(weights / "transformer"), (), model.config, torch.float32, fingerprinted=True)
    for name, parameter in model.named_parameters():
        alone.value_of(name, tuple(parameter.shape))
    assert description["transformer"]["fingerprint"] == alone.fingerprint()
    assert description["versions"]["torch"] == torch.__version__
    times = {path.name: path.stat().st_mtime_ns for path in Path("clips").iterdir()}
    generate(weights)
    assert {path.name: path.stat().st_mtime_ns for path in Path("clips").iterdir()} == times
    generate(weights, "--overwrite")
    assert contents("clips") == first
    assert all(path.stat().st_mtime_ns > times[path.name] for path in Path("clips").iterdir())


def test_the_same_command_goes_on_where_it_was_stopped(workplace, weights, frames, caplog):
    """A clip and its description, a clip alone and a description alone are what a kill can leave out."""
    words = ["--micro-batch-size", "2"]
    generate(weights, *words)
    whole, made = contents("clips"), dict(frames)
    for missing in (["video_0001.mp4", "video_0001.json"], ["video_0002.mp4"], ["video_0000.mp4", "video_0002.mp4"]):
        for name in missing:
            Path("clips", name).unlink()
        frames.clear()
        caplog.clear()
        caplog.set_level("INFO")
        generate(weights, *words)
        lost = {name for name in missing if name.endswith(".mp4")}
        assert contents("clips") == whole and set(frames) == lost
        assert all(np.array_equal(frames[name], made[name]) for name in lost)
        assert f"{3 - len(lost)} of 3 clips are in clips already" in caplog.text
    Path("clips/video_0001.json").unlink()
    with pytest.raises(DataError, match=r"DATA-050.*video_0001.mp4 \(no description"):
        generate(weights, *words)
    assert contents("clips").keys() == whole.keys() - {"video_0001.json"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "12"], r"3 clips .*video_0000.mp4 \(seed\)"),
        (["--num-inference-steps", "2", "--fps", "9"], r"video_0000.mp4 \(fps, num_inference_steps\)"),
        (["--prompt", "others.txt"], r"1 clips .*video_0001.mp4 \(prompt\)"),
        (["--load", "others"], "3 clips of other weights than these"),
    ],
)
def test_clips_of_another_command_are_refused_and_stay(workplace, weights, change, named):
    Path("others.txt").write_text("\n".join([PROMPTS[0], "another", PROMPTS[2]]))
    shutil.copytree(weights / "transformer", "base")
    generate(weights, "--load", "base")
    before = contents("clips")
    if "others" in change:  # the folder is the same, what it holds is not
        change = ["--load", "base"]
        state = load_file("base/diffusion_pytorch_model.safetensors")
        save_file({**state, "proj_out.bias": state["proj_out.bias"] + 1}, "base/diffusion_pytorch_model.safetensors")
    with pytest.raises(DataError, match=f"DATA-050.*{named}"):
        generate(weights, "--load", "base", *change)
    assert contents("clips") == before


def test_batched_prompts_euler_and_no_guidance(workplace, weights, frames):
    options = ["--sample-solver", "euler", "--guidance-scale", "1"]
    generate(weights, *options)
    alone = dict(frames)
    generate(weights, *options, "--overwrite", "--micro-batch-size", "2")
    for name, clip in frames.items():
        assert np.abs(clip.astype(int) - alone[name]).max() <= 1
    description = json.loads(Path("clips/video_0000.json").read_text())
    assert description["negative_prompt"] is None
    assert "solver_order" not in description


def test_weights_in_another_format_are_the_same_weights(workplace, weights):
    """A diffusers folder, native names, and the folder of a training run."""
    Path("prompts.txt").write_text("one")
    model = WanModel.from_pretrained(weights / "transformer")
    shape = model.config.model_dump(mode="json")
    Path("native").mkdir()
    save_file(model.state_dict(), "native/model.safetensors")
    Path("native/config.json").write_text(json.dumps(shape))
    pieces = [whole_piece(f"model.{name}", value) for name, value in model.state_dict().items()]
    with writing(Path("training")):
        save(Path("training"), 5, pieces, {"wan_config": shape})
    clips, descriptions = [], []
    for folder in (str(weights / "transformer"), "native", "training"):
        out = Path("clips") / Path(folder).name
        main(["--mm-model", "model.json", "--device", "cpu", "--load", folder, "--save-path", str(out)])
        clips.append((out / "video_0000.mp4").read_bytes())
        descriptions.append(json.loads((out / "video_0000.json").read_text())["transformer"])
    assert clips[0] == clips[1] == clips[2]
    assert len({description["fingerprint"] for description in descriptions}) == 1
    assert len({description["format"] for description in descriptions}) == 3


def test_bf16_runs(workplace, weights, frames):
    values = settings(weights)
    values["predictor"]["dtype"] = values["text_encoder"]["dtype"] = values["ae"]["dtype"] = "bf16"
    Path("model.json").write_text(json.dumps(values))
    generate(weights)
    low = dict(frames)
    Path("model.json").write_text(json.dumps(settings(weights)))
    generate(weights, "--overwrite")
    for name, clip in frames.items():
        assert 0 < np.abs(clip.astype(int) - low[name]).mean() < 8


def test_adapters_are_added_to_the_weights(workplace, weights, frames):
    """An adapter at strength s and its opposite cancel; one alone is the merged model's clip."""
    Path("prompts.txt").write_text(PROMPTS[0])
    generator = torch.Generator().manual_seed(0)
    update = Update(torch.randn(4, 512, generator=generator), torch.randn(128, 4, generator=generator), 2.0)
    write_adapter(Path("lora.safetensors"), Adapter({"blocks.1.ffn.2": update}), "comfyui")
    generate(weights)
    plain = frames["video_0000.mp4"]
    generate(weights, "--overwrite", "--lora", "lora.safetensors", "--lora-strength", "0.5")
    adapted = frames["video_0000.mp4"]
    assert np.abs(adapted.astype(int) - plain).max() > 20
    about = json.loads(Path("clips/video_0000.json").read_text())
    assert [entry["strength"] for entry in about["lora"]] == [0.5]
    model = WanModel.from_pretrained(weights / "transformer")
    state = model.state_dict()
    state["blocks.1.ffn.2.weight"] += 0.5 * (2.0 / 4) * update.b @ update.a
    Path("merged").mkdir()
    save_file(state, "merged/model.safetensors")
    Path("merged/config.json").write_text(json.dumps(model.config.model_dump(mode="json")))
    main(["--mm-model", "model.json", "--load", "merged", "--device", "cpu", "--overwrite"])
    assert np.abs(frames["video_0000.mp4"].astype(int) - adapted).max() <= 1
    Path("folder").mkdir()
    write_adapter(Path("folder/pytorch_lora_weights.safetensors"), Adapter({"blocks.1.ffn.2": update}), "peft")
    generate(weights, "--overwrite", "--lora", "folder/pytorch_lora_weights.safetensors", "--lora-strength", "0.5")
    assert np.array_equal(frames["video_0000.mp4"], adapted)
    again = json.loads(Path("clips/video_0000.json").read_text())["lora"]
    assert again[0]["fingerprint"] == about["lora"][0]["fingerprint"]  # of the adapter, not of the file
    both = ["--lora", "lora.safetensors", "lora.safetensors", "--lora-strength", "0.5", "-0.5"]
    generate(weights, "--overwrite", *both)
    assert np.abs(frames["video_0000.mp4"].astype(int) - plain).max() <= 1
