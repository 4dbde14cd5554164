"""Parts shared by tasks that are about given frames of a clip.

Source: Wan technical report (arXiv 2503.20314) section 5.1 and the released weights.
"""

from __future__ import annotations

from mm.config.tasks.task import Entry, Frame, InputFeature, Shape, Sizes, Source

MASK_CHANNELS = 4
"""Channels that tell the known frames: one for each of the frames that the VAE puts into a latent frame."""

IMG_DIM, CLIP_TOKEN_LEN = 1280, 257
"""Of the image encoder of every released model, CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and one token more."""

FIRST, LAST = Frame("first", 0), Frame("last", -1)
SIZES = {"img_dim": IMG_DIM, "clip_token_len": CLIP_TOKEN_LEN}
CONDITION_TILES = frozenset({"condition_tile_size", "condition_tile_stride"})
RECIPE = frozenset({"image_encoder"}) | CONDITION_TILES
SHAKING, CUT = "镜头晃动，", "镜头切换，"  # wan_i2v_14B.py and __init__.py of the release


def frame_features(num_images: int) -> tuple[InputFeature, ...]:
    """The features of models that see so many images: their tokens, and the known frames."""
    return image_tokens(num_images), known_frames()


def image_tokens(num_images: int) -> InputFeature:
    """Tokens of the image encoder, the first image's before the last one's."""

    def tokens(sizes: Sizes) -> Shape:
        return num_images * sizes.image_tokens, sizes.image_dim

    return InputFeature(
        name="image_features",
        title="Image features",
        source=Source.IMAGE_ENCODER,
        entry=Entry.CONTEXT,
        shape=tokens,
        module="img_emb",
        error="CFG-058",
        remedy="Give features of the image encoder this model was trained with, of one image for each latent in "
        "i2v and of two, first and last, in flf2v.",
        mindspeed="i2v_clip_feature",
        dropped_as=("image",),
    )


def known_frames() -> InputFeature:
    """A mask (1 known, 0 to generate) with the latents of a video of the known frames."""

    def parts(sizes: Sizes) -> dict[str, int]:
        return {"mask": MASK_CHANNELS, "condition": sizes.channels}

    def condition(sizes: Sizes) -> Shape:
        return sum(parts(sizes).values()), *sizes.latent

    return InputFeature(
        name="condition",
        title="Condition latents",
        source=Source.KNOWN_FRAMES,
        entry=Entry.CHANNELS,
        shape=condition,
        parts=parts,
        error="CFG-059",
        remedy=f"Give {MASK_CHANNELS} mask channels and the known frames' latents, in the size of the noisy latents.",
        mindspeed="i2v_vae_feature",
    )
