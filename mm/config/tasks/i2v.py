"""Image to video: the first frame is given. Fun-InP models, of the same shape, can be given the last one too."""

from mm.config.tasks.frames import FIRST, RECIPE, SHAKING, SIZES, frame_features
from mm.config.tasks.task import Task

I2V = Task(
    name="i2v",
    title="I2V",
    roles=(FIRST,),
    features=frame_features(num_images=1),
    sizes=SIZES,
    marks=frozenset({"img_emb.proj.0.weight"}),
    recipe=RECIPE,
    negative=SHAKING,
    with_last_frame="flf2v",
    with_mask=True,
)
