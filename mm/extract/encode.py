"""A clip and its caption to features: what a store gets of a sample, made from values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mm.data.clips import Clip
from mm.data.features import Feature
from mm.extract.sources import VisualEncoders, feature_makers, latents_in_front
from mm.wan.encoders import TextEncoder


class ClipEncoder:
    """The encoders of a task, together.

    Each clip and each caption is encoded by itself: in a batch, padded or not, they come out with other last bits (some
    1e-7 in fp32), and what a store holds would depend on which samples happen to be neighbours.
    """

    def __init__(self, text: TextEncoder, visual: VisualEncoders) -> None:
        """Take loaded encoders.

        Args:
            text: of captions. visual: of the clip and of what the task declares.

        Raises:
            DataError: DATA-045 for an image encoder of another model.
        """
        self._text, self._video, self._task = text, visual.video, visual.task
        self._makers = feature_makers(visual)

    def prompt(self, caption: str) -> Tensor:
        """A caption's embedding, [L, D]."""
        return self._text.encode([caption])[0]

    def encode(self, clip: Clip, prompt: Tensor, columns: Mapping[str, float]) -> Feature:
        """Features of a clip with its caption's embedding and the task's columns; DATA-044 for another VAE.

        Latents of images that stand in front of the clip's come first.
        """
        of_clip = self._video.encode(clip.pixels.unsqueeze(0))[0]
        features = {name: make(clip, columns) for name, make in self._makers.items()}
        latents = torch.cat((latents_in_front(self._task, features, of_clip), of_clip), dim=1)
        return Feature(latents, prompt, clip.start, features, clip.taken)
