"""Video to video by a mask, with references: blocks beside the model's add hints to it.

Source: VACE (arXiv 2503.07598) and its released models.
"""

from __future__ import annotations

from mm.config.tasks.frames import CONDITION_TILES
from mm.config.tasks.fun import PIXELS_OF_A_LATENT
from mm.config.tasks.task import Entry, InputFeature, Media, Shape, Sizes, Source, Task


def parts(sizes: Sizes) -> dict[str, int]:
    """Channels of the context, in order."""
    return {"kept": sizes.channels, "free": sizes.channels, "mask": PIXELS_OF_A_LATENT**2}


def _context(sizes: Sizes) -> Shape:
    return sum(parts(sizes).values()), *sizes.latent


VACE = Task(
    name="vace",
    title="VACE",
    roles=(
        Media("vace_video", "video", listed="videos", required=False, from_clip="whole", also=("control",)),
        Media("mask", "mask", listed="masks", required=False),
        Media(
            "vace_reference",
            "images",
            listed="references",
            required=False,
            in_front=True,
            most=8,
            also=("reference", "object"),
        ),
    ),
    features=(
        InputFeature(
            name="vace_context",
            title="VACE contexts",
            source=Source.EDITED_VIDEO,
            entry=Entry.SIDE_BLOCKS,
            shape=_context,
            parts=parts,
            module="vace_patch_embedding",
            error="CFG-272",
            remedy="Give latents of what the mask keeps, of what it gives free, and 64 mask channels, in the size of "
            "the noisy latents.",
        ),
        InputFeature(
            name="vace_scale",
            title="VACE scales",
            source=Source.SETTING,
            entry=Entry.HINTS,
            shape=lambda sizes: (),
            error="CFG-273",
            remedy="Give one number for each latent, or leave it out for 1.",
            optional=True,
        ),
    ),
    sizes={"vace_layers": tuple(range(0, 30, 2))},
    marks=frozenset({"vace_patch_embedding.weight"}),
    recipe=CONDITION_TILES,
)
