"""Text to video with a speed: how much moves is told by a number from 0 to 100, `motion_bucket_id`.

Source: DiffSynth-Studio's Wan2.1-1.3b-speedcontrol-v1.
"""

from mm.config.tasks.task import Column, Entry, InputFeature, Source, Task

MOTION = Column("motion_bucket_id", lowest=0, highest=100)

SPEEDCONTROL = Task(
    name="speedcontrol",
    title="SpeedControl",
    roles=(MOTION,),
    features=(
        InputFeature(
            name=MOTION.name,
            title="Motion bucket ids",
            source=Source.COLUMN,
            entry=Entry.TIME_MODULATION,
            shape=lambda sizes: (),
            module="motion_controller",
            error="CFG-195",
            remedy=f"Give {MOTION.expected} for each latent.",
            optional=True,
        ),
    ),
    marks=frozenset({"motion_controller.linear.0.weight"}),
)
