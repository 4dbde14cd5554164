"""Writes examples/wanvideo: for each model of DiffSynth-Studio's guide how it is run, trained, and looked at then.

    python tools/write_diffsynth_examples.py

One table says how the models differ; `tests/examples/test_diffsynth_examples.py` holds the files to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1] / "examples" / "wanvideo"
DATA = "data/example_video_dataset"
T5, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TRANSFORMER = "diffusion_pytorch_model*.safetensors"
WIDTH = 120
NEGATIVE = "blurred, static, low quality, deformed, watermark, subtitles"
PROMPT = "from sunset to night, a small town, light, house, river"


@dataclass(frozen=True)
class Model:
    """One model of the guide's table.

    Attributes:
        model_id: of the release. run_as: name of the program that makes a clip, where the guide's is another.
        inputs: what it is given beside the prompt. sees_images: it has an image encoder.
        height, width, num_frames: of its clips. full_frames: of those that it is trained whole on.
        shift: of its sampler. rate, rank: of its LoRA. adapter_of: the model that it is added to.
        trained: the pipeline's models that are trained whole. metadata: the list of its data set.
        keys: columns of files in it, beside image and video.
    """

    model_id: str
    run_as: str | None = None
    inputs: tuple[str, ...] = ()
    sees_images: bool = False
    height: int = 480
    width: int = 832
    num_frames: int = 81
    full_frames: int = 81
    shift: int = 5
    rate: str = "1e-4"
    rank: int = 32
    adapter_of: str | None = None
    trained: tuple[str, ...] = ("dit",)
    metadata: str = "metadata.csv"
    keys: tuple[str, ...] = field(default=())

    @property
    def title(self) -> str:
        """Name of its files."""
        return self.model_id.partition("/")[2]

    @property
    def is_large(self) -> bool:
        """Whether it is one of 14 billion parameters."""
        return "14B" in self.model_id

    @property
    def files(self) -> list[tuple[str, str]]:
        """Ids and patterns of all files."""
        home = self.adapter_of or self.model_id
        own = [(self.model_id, "model.safetensors")] if self.adapter_of else []
        patterns = [TRANSFORMER, T5, VAE, *[CLIP] * self.sees_images]
        return [(home, pattern) for pattern in patterns] + own


BOTH = ("input_image", "end_image")
CONTROL: dict[str, Any] = {"inputs": ("control_video",), "metadata": "metadata_control.csv", "keys": ("control_video",)}
REFERENCED: dict[str, Any] = {
    "inputs": ("control_video", "reference_image"),
    "metadata": "metadata_reference_control.csv",
    "keys": ("control_video", "reference_image"),
}
CAMERA: dict[str, Any] = {
    "inputs": ("input_image", "camera_control_direction"),
    "metadata": "metadata_camera_control.csv",
    "keys": ("camera",),
}
EDITED: dict[str, Any] = {
    "inputs": ("vace_video", "vace_reference_image"),
    "metadata": "metadata_vace.csv",
    "keys": ("vace_video", "vace_reference_image"),
    "trained": ("vace",),
    "shift": 16,
    "full_frames": 49,
}
LARGE: dict[str, Any] = {"height": 720, "width": 1280}
MODELS = (
    Model("Wan-AI/Wan2.1-T2V-1.3B"),
    Model("Wan-AI/Wan2.1-T2V-14B"),
    Model("Wan-AI/Wan2.1-I2V-14B-480P", inputs=("input_image",), sees_images=True),
    Model("Wan-AI/Wan2.1-I2V-14B-720P", inputs=("input_image",), sees_images=True, full_frames=49, **LARGE),
    Model("Wan-AI/Wan2.1-FLF2V-14B-720P", inputs=BOTH, sees_images=True, shift=16),
    Model("PAI/Wan2.1-Fun-1.3B-InP", inputs=BOTH, sees_images=True),
    Model("PAI/Wan2.1-Fun-1.3B-Control", sees_images=True, **CONTROL),
    Model("PAI/Wan2.1-Fun-14B-InP", inputs=BOTH, sees_images=True),
    Model("PAI/Wan2.1-Fun-14B-Control", sees_images=True, **CONTROL),
    Model("PAI/Wan2.1-Fun-V1.1-1.3B-Control", sees_images=True, **REFERENCED),
    Model("PAI/Wan2.1-Fun-V1.1-14B-Control", sees_images=True, **REFERENCED),
    Model("PAI/Wan2.1-Fun-V1.1-1.3B-InP", inputs=BOTH, sees_images=True),
    Model("PAI/Wan2.1-Fun-V1.1-14B-InP", inputs=BOTH, sees_images=True),
    Model("PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera", sees_images=True, rate="1e-5", **CAMERA),
    Model("PAI/Wan2.1-Fun-V1.1-14B-Control-Camera", sees_images=True, rate="1e-5", **CAMERA),
    Model("iic/VACE-Wan2.1-1.3B-Preview", run_as="Wan2.1-VACE-1.3B-Preview", **EDITED),
    Model("Wan-AI/Wan2.1-VACE-1.3B", **EDITED),
    Model("Wan-AI/Wan2.1-VACE-14B", **{**EDITED, "full_frames": 17}),
    Model(
        "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1",
        inputs=("motion_bucket_id",),
        metadata="metadata_motion_bucket_id.csv",
        adapter_of="Wan-AI/Wan2.1-T2V-1.3B",
        trained=("motion_controller",),
    ),
)
ONE_CLIP = {"camera_control_direction": '"Left"', "motion_bucket_id": "50"}
"""Values of the inputs that are no pictures."""
PICTURES = {
    "input_image": "video[0]",
    "end_image": "video[-1]",
    "reference_image": "video[0]",
    "vace_reference_image": "video[0]",
    "control_video": 'frames_of("video1_softedge.mp4")',
    "vace_video": 'frames_of("video1_softedge.mp4")',
}


def shell(model: Model, kind: str) -> str:
    """The script that trains a model, whole (`full`) or a LoRA of it (`lora`)."""
    is_full = kind == "full"
    names = ",".join(f"{model_id}:{pattern}" for model_id, pattern in model.files)
    given = [word for word in model.inputs if not word.startswith("camera")]
    frames = model.full_frames if is_full else model.num_frames
    prefixes = ",".join(f"pipe.{part}." for part in model.trained)
    words = [
        f"--dataset_base_path {DATA}",
        f"--dataset_metadata_path {DATA}/{model.metadata}",
        *([f'--data_file_keys "image,video,{",".join(model.keys)}"'] if model.keys else []),
        f"--height {model.height}",
        f"--width {model.width}",
        f"--num_frames {frames}",
        "--dataset_repeat 100",
        f'--model_id_with_origin_paths "{names}"',
        f"--learning_rate {'1e-5' if is_full else model.rate}",
        f"--num_epochs {2 if is_full else 5}",
        f'--remove_prefix_in_ckpt "{prefixes if is_full else "pipe.dit."}"',
        f'--output_path "./models/train/{model.title}_{kind}"',
        *([f'--trainable_models "{",".join(model.trained)}"'] if is_full else []),
        *([] if is_full else ['--lora_base_model "dit"', '--lora_target_modules "q,k,v,o,ffn.0,ffn.2"']),
        *([] if is_full else [f"--lora_rank {model.rank}"]),
        *([f'--extra_inputs "{",".join(given)}"'] if given else []),
    ]
    configured = ' --config_file "$here/accelerate_config_14B.yaml"' if model.is_large and is_full else ""
    what = _OF[model.trained] if is_full else "a LoRA of it"
    head = f"# {model.title}: {what}. Further arguments win over these; ACCELERATE_ARGS has accelerate's.\n"
    launch = f'accelerate launch{configured} ${{ACCELERATE_ARGS:-}} "$here/../train.py" \\\n'
    start = f'#!/bin/bash\n{head}set -e\nhere=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)\n{launch}'
    return start + "".join(f"  {word} \\\n" for word in words) + '  "$@"\n'


def script(model: Model, kind: str | None) -> str:
    """The program that makes a clip: of the model as released, or trained whole, or with its LoRA."""
    trained = f"models/train/{model.title}_{kind}/epoch-{1 if kind == 'full' else 4}.safetensors"
    needs_video = any(word in PICTURES for word in model.inputs)
    lines = [
        f'"""A clip of {model.title}{_AS[kind]}."""',
        "",
        *(["import av"] if needs_video else []),
        "import torch",
        *(["from PIL import Image"] if needs_video else []),
        "",
    ]
    lines += ["from mm import ModelConfig, WanVideoPipeline, save_video", ""]
    if needs_video:
        lines += [
            "",
            "def frames_of(name: str) -> list[Image.Image]:",
            f'    """Frames of a video of the data set in {DATA}."""',
        ]
        lines += [f'    with av.open(f"{DATA}/{{name}}") as file:']
        lines += ["        return [frame.to_image() for frame in file.decode(video=0)]", "", ""]
    lines += ["pipe = WanVideoPipeline.from_pretrained(", "    torch_dtype=torch.bfloat16,", '    device="cuda",']
    lines += ["    model_configs=["]
    for model_id, pattern in model.files:
        replaced = kind == "full" and pattern == _FILE_OF[model.trained]
        told = f'path="{trained}"' if replaced else f'model_id="{model_id}", origin_file_pattern="{pattern}"'
        lines += _config(told)
    if kind == "full" and model.trained == ("vace",):  # beside what the release has of it
        lines += _config(f'path="{trained}"')
    lines += ["    ],", ")"]
    if kind == "lora":
        lines.append(f'pipe.load_lora(pipe.dit, "{trained}", alpha=1)')
    if any(word in PICTURES and "video[" in PICTURES[word] for word in model.inputs):
        lines.append('video = frames_of("video1.mp4")')
    lines += ["clip = pipe(", f'    prompt="{PROMPT}",', f'    negative_prompt="{NEGATIVE}",']
    values = {**PICTURES, **ONE_CLIP}
    lines += [f"    {word}={values[word]}," for word in model.inputs]
    frames = model.full_frames if kind == "full" else model.num_frames
    lines += [f"    height={model.height},", f"    width={model.width},", f"    num_frames={frames},"]
    lines += ["    num_inference_steps=50,", f"    sigma_shift={model.shift},", "    seed=0,", "    tiled=True,", ")"]
    lines.append(f'save_video(clip, "{model.title}{"_" + kind if kind else ""}.mp4", fps=15, quality=5)')
    return "\n".join(lines) + "\n"


def _config(told: str) -> list[str]:
    """A ModelConfig as the formatter lays it out."""
    whole = f"        ModelConfig({told}),"
    if len(whole) <= WIDTH:
        return [whole]
    inside = f"            {told}"
    parts = [inside] if len(inside) <= WIDTH else [f"            {part}," for part in told.split(", ")]
    return ["        ModelConfig(", *parts, "        ),"]


_OF: dict[tuple[str, ...], str] = {
    ("dit",): "all of it",
    ("vace",): "its side blocks",
    ("motion_controller",): "its motion controller",
}
_FILE_OF: dict[tuple[str, ...], str | None] = {
    ("dit",): TRANSFORMER,
    ("vace",): None,
    ("motion_controller",): "model.safetensors",
}
"""File of a release that the trained one stands for."""
_AS = {None: " as it is released", "full": ", trained whole", "lora": " with its LoRA"}
ACCELERATE = """# Eight devices share the parameters, their gradients and the optimizer's state.
# accelerate only starts the processes; FULL_SHARD and ZeRO-3 are layer-zero here.
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_sharding_strategy: FULL_SHARD
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 8
rdzv_backend: static
same_network: true
use_cpu: false
"""


def files() -> dict[str, str]:
    """Texts of all files, by their paths below examples/wanvideo."""
    found = {"model_training/full/accelerate_config_14B.yaml": ACCELERATE}
    for model in MODELS:
        found[f"model_inference/{model.run_as or model.title}.py"] = script(model, None)
        for kind in ("full", "lora"):
            found[f"model_training/{kind}/{model.title}.sh"] = shell(model, kind)
            found[f"model_training/validate_{kind}/{model.title}.py"] = script(model, kind)
    return found


if __name__ == "__main__":
    for name, text in files().items():
        path = HOME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
