"""The frozen image encoder of image-to-video models: the visual half of CLIP (transformers)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel

from mm.config.model import Precision
from mm.device.precision import true_fp32
from mm.wan.component import load_strictly
from mm.wan.encoders import DTYPES

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images


class ImageEncoder:
    """CLIP features of frames, as Wan takes them: the hidden states before the last layer, of every token.

    The whole frame is squeezed into CLIP's square, bicubically and without smoothing, so that nothing of it is cut off.
    Source: the Wan2.1 release (wan/modules/clip.py), whose models were trained so.
    """

    def __init__(self, model: CLIPVisionModel) -> None:
        """Take a loaded model, on its device and in its precision."""
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: Precision, device: torch.device) -> ImageEncoder:
        """Load the image encoder of a folder in the transformers layout.

        Raises:
            DataError: DATA-040 to DATA-042, see `mm.wan.component.load_strictly`.
        """
        # the head after the last layer, which folders saved as CLIPVisionModelWithProjection hold
        unused = ("visual_projection.weight",)
        model: CLIPVisionModel = load_strictly(CLIPVisionModel, folder, unused, dtype=DTYPES[dtype])
        return cls(model.to(device))

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)

    @property
    def width(self) -> int:
        """Width of a token's features, img_dim of the transformer."""
        return int(self.model.config.hidden_size)

    @property
    def num_tokens(self) -> int:
        """Number of one image's tokens, clip_token_len of the transformer: one a patch and the class token."""
        return int((self.model.config.image_size // self.model.config.patch_size) ** 2 + 1)

    @torch.no_grad()
    @true_fp32()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, H, W] in [-1, 1], RGB, to features [B, num_tokens, width] in the model's precision."""
        side = self.model.config.image_size
        frames = frames.to(self.model.device, torch.float32)
        if frames.shape[2:] != (side, side):
            frames = F.interpolate(frames, size=(side, side), mode="bicubic", align_corners=False)
        mean, std = (frames.new_tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        pixels = (frames * 0.5 + 0.5 - mean) / std
        states = self.model(pixels.to(self.model.dtype), output_hidden_states=True).hidden_states
        features: Tensor = states[-2]
        return features
