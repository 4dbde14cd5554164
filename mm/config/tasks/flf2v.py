"""First and last frame to video: both are given, and the model sees both."""

from mm.config.tasks.frames import CUT, FIRST, LAST, RECIPE, SHAKING, SIZES, frame_features
from mm.config.tasks.task import Task

FLF2V = Task(
    name="flf2v",
    title="FLF2V",
    roles=(FIRST, LAST),
    features=frame_features(num_images=2),
    sizes=SIZES,
    positions=True,
    marks=frozenset({"img_emb.proj.0.weight", "img_emb.emb_pos"}),
    recipe=RECIPE,
    negative=CUT + SHAKING,
)
