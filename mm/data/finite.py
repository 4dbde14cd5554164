"""Values of samples that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mm.errors import DataError


def _is_finite(tensor: Tensor) -> bool:
    """Look at the smallest and the largest value, which are NaN where one is: a tenth of the time of asking each."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def require_finite(tensors: Mapping[str, Tensor], place: str, remedy: str) -> None:
    """Refuse values that are NaN or infinite; raises DATA-013."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise DataError("DATA-013", f"{place}: {name} has values that are NaN or infinite.", remedy)
