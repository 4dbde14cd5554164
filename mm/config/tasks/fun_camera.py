"""Camera path to video: a start image, and the rays of the camera's pixels.

Source: VideoX-Fun's Wan2.1-Fun-V1.1-Control-Camera models; Pluecker coordinates as in CameraCtrl (arXiv 2404.02101).
"""

from mm.config.tasks.frames import MASK_CHANNELS
from mm.config.tasks.fun import PIXELS_OF_A_LATENT, RECIPE, SIZES, START_FEATURES
from mm.config.tasks.task import Entry, InputFeature, Media, Shape, Sizes, Source, Task

RAY_CHANNELS = 6 * MASK_CHANNELS
"""Six coordinates of a ray, of each of the frames that the VAE puts into a latent frame."""
NUMBERS_A_POSE = 19
"""Of a line of a file of camera poses."""


def _rays(sizes: Sizes) -> Shape:
    frames, height, width = sizes.latent
    return RAY_CHANNELS, frames, PIXELS_OF_A_LATENT * height, PIXELS_OF_A_LATENT * width


def _path(sizes: Sizes) -> Shape:
    """A row for each frame of the clip, and one in front that says which part of the picture the clip is."""
    return MASK_CHANNELS * (sizes.latent[0] - 1) + 2, NUMBERS_A_POSE


FUN_CAMERA = Task(
    name="fun_camera",
    title="Fun-V1.1-Control-Camera",
    roles=(
        Media("first_frame", "image", listed="images", from_clip="first frame"),
        Media("camera", "poses", listed="cameras"),
    ),
    features=(
        *START_FEATURES,
        InputFeature(
            name="camera",
            title="Camera rays",
            source=Source.CAMERA_PATH,
            entry=Entry.HIDDEN,
            shape=_rays,
            stored=_path,
            module="control_adapter",
            error="CFG-271",
            remedy=f"Give {RAY_CHANNELS} channels for each latent frame, in the height and width of the pixels.",
            optional=True,
        ),
    ),
    sizes=SIZES,
    marks=frozenset({"img_emb.proj.0.weight", "control_adapter.conv.weight"}),
    recipe=RECIPE,
)
