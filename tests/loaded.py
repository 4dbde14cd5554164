"""Models with weights of any format, for tests that compare whole models."""

import torch
from torch import nn

from mm.checkpoint.mismatch import require_exactly
from mm.checkpoint.weights import WeightSource


def load_into(model: nn.Module, source: WeightSource) -> None:
    """Fill every parameter of `model`, each in its own dtype; the model is unchanged where tensors are of another."""
    parameters = dict(model.named_parameters())
    require_exactly(source, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(source.read(name))
