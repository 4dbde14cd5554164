"""Runs of `mm generate` on a tiny model, in this process, and what they leave."""

import json
import os
from pathlib import Path

import av
from kept_frames import keeping_frames

import mm.generate.run
from mm.cli.entry import run
from mm.cli.generate import main

EXAMPLES = Path(__file__).parents[2] / "examples/wan2.1"
PROMPTS = ["a red disc moves left", "a blue disc moves up", "something else"]
SIZE, STEPS, SHIFT, GUIDANCE, SEED = [9, 32, 48], 3, 3.0, 4.0, 11
NEGATIVE = "a green disc"


def settings(weights):
    """inference_model.json for the tiny model, everything in fp32."""
    shape = json.loads((weights / "transformer/config.json").read_text())
    return {
        "prompt": "prompts.txt",
        "negative_prompt": NEGATIVE,
        "save_path": "clips",
        "fps": 8,
        "seed": SEED,
        "pipeline_config": {"input_size": SIZE},
        "ae": {"from_pretrained": str(weights / "vae"), "dtype": "fp32"},
        "tokenizer": {"from_pretrained": str(weights / "tokenizer")},
        "text_encoder": {"from_pretrained": str(weights / "text_encoder"), "dtype": "fp32"},
        "predictor": {
            "dtype": "fp32",
            "text_dim": shape["text_dim"],
            "hidden_size": shape["num_attention_heads"] * shape["attention_head_dim"],
            "ffn_dim": shape["ffn_dim"],
            "num_heads": shape["num_attention_heads"],
            "num_layers": shape["num_layers"],
            "freq_dim": shape["freq_dim"],
        },
        "diffusion": {"num_inference_steps": STEPS, "flow_shift": SHIFT, "guidance_scale": GUIDANCE},
    }


def generate(weights, *words):
    main(["--mm-model", "model.json", "--load", str(weights / "transformer"), "--device", "cpu", *words])


def failure(capfd, *words):
    """Exit code and the error lines of a run that fails."""
    code = run(main, ["--mm-model", "model.json", "--device", "cpu", "--no-progress-bar", *words])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error ")]
    assert lines and all(" Fix: " in line for line in lines)
    return code, [line.split()[1].rstrip(":") for line in lines]


def contents(folder):
    """Of each file. Of clips that they are whole: x264 does not give the same bytes each time on every CPU."""
    return {
        path.name: _frames_of(path) if path.suffix == ".mp4" else path.read_bytes() for path in Path(folder).iterdir()
    }


def _frames_of(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def generate_here(folder, weights, words):
    """One process of several."""
    os.chdir(folder)
    with keeping_frames(mm.generate.run):
        main(["--mm-model", "model.json", "--load", weights, "--device", "cpu", "--no-progress-bar", *words])


LAYERZERO = ["--layerzero", "--layerzero-config", "zero.yaml"]
