"""Text or first frame to video of Wan2.2's 5B model: a given frame is a clean part of the noisy latents.

A timestep for each token tells the model what is clean. In training that is the first latent frame of the clip itself,
which the causal VAE makes of the first frame alone; in generation it is that of an image.

Source: the released Wan2.2-TI2V-5B weights.
"""

from mm.config.tasks.task import Media, Task

TI2V = Task(
    name="ti2v",
    title="Wan2.2 TI2V",
    roles=(Media("first_frame", "image", listed="images", required=False, is_trained=False),),
    latent_channels=48,
    latent_pixels=16,
    first_frame_share=0.5,  # both of what its name says
    with_video="v2v",
)
