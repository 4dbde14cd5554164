"""Names of parameters in DiffSynth-Studio's pipeline, where parts of one model here are models of their own."""

from __future__ import annotations

from mm.config.model import WanConfig
from mm.config.tasks.vace import VACE

PIPELINE = "pipe."
TRANSFORMER = "dit"
MOTION_CONTROLLER = "motion_controller"
_SIDE = ("vace_blocks.", "vace_patch_embedding.")
_TRANSFORMER = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb", "blocks", "head")
FROZEN = frozenset({"text_encoder", "vae", "image_encoder", "prompter"})
"""Models of the pipeline that make features, and are trained nowhere here."""


def models_of(wan: WanConfig) -> tuple[str, ...]:
    """The pipeline's models that a model here consists of."""
    side = (VACE.name,) if wan.vace_layers else ()
    motion = (MOTION_CONTROLLER,) if MOTION_CONTROLLER in wan.task.modules else ()
    return TRANSFORMER, *side, *motion


def model_of(name: str) -> str:
    """The pipeline's model that has the parameter of a native name."""
    if name.startswith(_SIDE):
        return VACE.name
    return MOTION_CONTROLLER if name.startswith(f"{MOTION_CONTROLLER}.") else TRANSFORMER


def words_of_model(model: str, wan: WanConfig) -> list[str]:
    """Words of `mm.config.trainable` for all parameters of one of the pipeline's models."""
    if model == VACE.name:
        return [f"^{start}" for start in _SIDE]
    if model == MOTION_CONTROLLER:
        return [f"^{MOTION_CONTROLLER}."]
    own = [name for name in _TRANSFORMER if name != "img_emb" or wan.img_dim is not None]
    more = [name for name in wan.task.modules if name not in own and model_of(f"{name}.") == TRANSFORMER]
    return [f"^{name}." for name in (*own, *more)]


def pipeline_name(name: str) -> str:
    """`pipe.dit.blocks.0.self_attn.q.weight`, of the native name without the first two parts."""
    return f"{PIPELINE}{model_of(name)}.{name.removeprefix(f'{MOTION_CONTROLLER}.')}"


def name_in_file(name: str, prefixes: str) -> str:
    """The pipeline's name of a parameter without the first of `--remove_prefix_in_ckpt` that it begins with.

    Args:
        name: the native one. prefixes: with commas between them, as weights of two of the pipeline's models need two.
    """
    whole = pipeline_name(name)
    found = (prefix for prefix in prefixes.split(",") if prefix and whole.startswith(prefix))
    return whole.removeprefix(next(found, ""))
