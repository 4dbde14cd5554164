"""Condition of Control-Camera models: the rays of a camera on its path, of every pixel of every frame.

A ray is given in Pluecker's coordinates: its moment (origin x direction), then its direction. Directions have length 1,
and are then turned by the camera's matrix: where that is no rotation, between two poses or of a direction's name, it
changes the length, as the models were trained. The first frame's camera is the origin of the world.

Source: VideoX-Fun's handling of camera paths (CameraCtrl, arXiv 2404.02101). It takes the cross product over the frames
where there are exactly three; here, and in DiffSynth-Studio, it is always that of the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm.errors import ConfigError
from mm.poses import CENTRES, FOCAL_LENGTHS, MATRIX, NUMBERS_A_ROW
from mm.wan.conditions.pixels import group_frames

SOURCE_ASPECT = 16 / 9
"""Width by height of the pictures that paths of RealEstate10K and CameraCtrl belong to."""


@dataclass(frozen=True)
class View:
    """Part of a camera's picture that a clip shows.

    Attributes:
        height, width: of the clip, in pixels.
        cover: height and width that the picture was resized to before the clip was cut out; None where nothing was.
        corner: top and left of the clip in it.
        aspect: width by height of the picture that the path's focal lengths are fractions of. Where `cover` has
            another aspect, it is taken for the middle of that picture, and the optical centre for the same fraction of
            it, as VideoX-Fun does.
    """

    height: int
    width: int
    cover: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)
    aspect: float = SOURCE_ASPECT


def camera_channels(rows: Tensor, view: View) -> Tensor:
    """Channels that a Control-Camera model's adapter takes, of a clip.

    Args:
        rows: [frames, 19] of the clip's frames, 4k + 1, as `mm.poses` gives them. view: its part of the
            picture.

    Returns:
        [24, F, height, width] fp32, at full size: channel 4 c + t is component c of `plucker_rays` in the t-th of the
        four frames that a latent frame stands for; the first frame stands four times.

    Raises:
        ConfigError: CFG-255 for another number of frames, CFG-258 for rows of another shape.
    """
    grouped = group_frames(plucker_rays(rows, view))  # [F, 4, 6, height, width]
    return grouped.permute(2, 1, 0, 3, 4).flatten(0, 1)


def channels_of_path(path: Tensor) -> Tensor:
    """Channels of a path as stores have it (`mm.data.beside`), [24, F, height, width] fp32.

    Args:
        path: [frames + 1, 19] fp64; the first row has height and width of the clip, those that the picture was resized
            to, and top and left of the clip in it.
    """
    height, width, *cover, top, left = map(int, path[0, :6].tolist())
    return camera_channels(path[1:], View(height, width, (cover[0], cover[1]), (top, left)))


def plucker_rays(rows: Tensor, view: View) -> Tensor:
    """Rays through the middle of each pixel, computed in fp64.

    Args:
        rows: [frames, 19], see `mm.poses`. view: what part of the picture the pixels are.

    Returns:
        [frames, 6, height, width] fp32: moments, then directions.

    Raises:
        ConfigError: CFG-258 for rows of another shape.
    """
    if rows.ndim != 2 or rows.shape[1] != NUMBERS_A_ROW or not len(rows):
        message = f"Camera poses are {list(rows.shape)}, expected [frames, {NUMBERS_A_ROW}]."
        raise ConfigError("CFG-258", message, "Give a row for each frame of the clip.")
    poses = relative_poses(rows)
    directions = _directions(rows.double(), view)
    turned = torch.einsum("fij,fjhw->fihw", poses[:, :, :3], directions)
    origins = poses[:, :, 3, None, None].expand_as(turned)
    return torch.cat((torch.linalg.cross(origins, turned, dim=1), turned), dim=1).float()


def relative_poses(rows: Tensor) -> Tensor:
    """Camera-to-world matrices [frames, 3, 4] fp64, in the world of the first frame's camera."""
    to_camera = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    to_camera[:, :3] = rows[:, MATRIX].double().view(-1, 3, 4)
    return (to_camera[0] @ torch.linalg.inv(to_camera))[:, :3]


def _directions(rows: Tensor, view: View) -> Tensor:
    """Directions of length 1 in the camera's own world, [frames, 3, height, width]: x right, y down, z ahead."""
    height, width = view.cover or (view.height, view.width)
    whole = max(height, width / view.aspect)  # height of the picture of which the cover is the middle
    focal = rows[:, FOCAL_LENGTHS] * rows.new_tensor((whole * view.aspect, whole))
    centre = rows[:, CENTRES] * rows.new_tensor((width, height))
    along = _offsets(view.width, view.corner[1], centre[:, 0], focal[:, 0])
    down = _offsets(view.height, view.corner[0], centre[:, 1], focal[:, 1])
    shape = (len(rows), view.height, view.width)
    ahead = torch.ones(shape, dtype=rows.dtype)
    found = torch.stack((along[:, None, :].expand(shape), down[:, :, None].expand(shape), ahead), dim=1)
    return found / torch.linalg.vector_norm(found, dim=1, keepdim=True)


def _offsets(length: int, begin: int, centre: Tensor, focal: Tensor) -> Tensor:
    """Offsets from the optical axis of the pixels of one side, one unit ahead of the camera: [frames, length]."""
    middles = torch.arange(begin, begin + length, dtype=centre.dtype) + 0.5
    return (middles - centre[:, None]) / focal[:, None]
