"""Inpainting: any pixels of the clip are given, by masks that are drawn or listed. Its models are those of `i2v`.

Source: VideoX-Fun's Wan2.1-Fun-InP models.
"""

from dataclasses import replace

from mm.config.tasks.frames import RECIPE, SIZES, image_tokens, known_frames
from mm.config.tasks.i2v import I2V
from mm.config.tasks.task import Media, Source, Task

FUN_INP = Task(
    name="fun_inp",
    title="Fun-InP",
    models_of=I2V.name,
    roles=(Media("mask", "mask", listed="masks", required=False),),
    features=(image_tokens(1), replace(known_frames(), source=Source.KNOWN_PIXELS, mindspeed=None)),
    sizes=SIZES,
    recipe=RECIPE,
)
