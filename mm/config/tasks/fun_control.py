"""Control to video, the first version: a control video as channels, and a start image that may be zeros.

Source: VideoX-Fun's Wan2.1-Fun-Control models.
"""

from mm.config.tasks.fun import CONTROL, CONTROL_FEATURES, RECIPE, SIZES, START
from mm.config.tasks.task import Task

FUN_CONTROL = Task(
    name="fun_control",
    title="Fun-Control",
    roles=(CONTROL, START),
    features=CONTROL_FEATURES,
    sizes=SIZES,
    marks=frozenset({"img_emb.proj.0.weight"}),
    recipe=RECIPE,
)
