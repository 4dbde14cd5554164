"""Image to video of Wan2.2's A14B models: the first frame is given as latents alone, without an image encoder.

Source: the released Wan2.2-I2V-A14B weights.
"""

from mm.config.tasks.frames import CONDITION_TILES, FIRST, known_frames
from mm.config.tasks.task import Task

WAN22_I2V = Task(
    name="wan22_i2v",
    title="Wan2.2 I2V",
    roles=(FIRST,),
    features=(known_frames(),),
    recipe=CONDITION_TILES,
)
