"""Control to video with a reference image, which the video's tokens see in front of them.

Source: VideoX-Fun's Wan2.1-Fun-V1.1-Control models.
"""

from mm.config.tasks.fun import CONTROL, CONTROL_FEATURES, RECIPE, SIZES, START
from mm.config.tasks.task import Entry, InputFeature, Media, Source, Task

FUN_CONTROL_REF = Task(
    name="fun_control_ref",
    title="Fun-V1.1-Control",
    roles=(
        CONTROL,
        START,
        Media("reference", "image", listed="references", required=False, from_clip="other frame"),
    ),
    features=(
        *CONTROL_FEATURES,
        InputFeature(
            name="reference_latents",
            title="Reference latents",
            source=Source.REFERENCE_IMAGE,
            entry=Entry.TOKENS,
            shape=lambda sizes: (sizes.channels, *sizes.latent[1:]),
            module="ref_conv",
            error="CFG-270",
            remedy="Give latents of one frame, without the axis of frames, in the noisy latents' height and width.",
            optional=True,
            dropped_as=("reference",),
        ),
    ),
    sizes=SIZES,
    marks=frozenset({"img_emb.proj.0.weight", "ref_conv.weight"}),
    recipe=RECIPE,
)
