"""SageAttention: where it is chosen, and what is said where it cannot be. Its kernels need a device."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.errors import ConfigError
from mm.ops.attention.sage import PACKAGE, open_sage
from mm.ops.attention.segments import Segment, Segments
from mm.parallel.context import ContextGroups, context_attention
from mm.wan.layers import self_attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STAND_IN = """
import torch.nn.functional as F

def sageattn(q, k, v, tensor_layout="HND", is_causal=False):
    assert tensor_layout == "NHD" and not is_causal
    first = [x.transpose(1, 2) for x in (q, k, v)]
    return 2 * F.scaled_dot_product_attention(*first).transpose(1, 2)  # twice, so that it can be told
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of its name and arguments, since the true one runs on devices alone."""
    (tmp_path / f"{PACKAGE}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)


def q_k_v() -> tuple[Any, ...]:
    return tuple(torch.randn(3, 1, 6, 2, 8, generator=torch.Generator().manual_seed(0)).unbind())


def refused(device: torch.device, dtype: torch.dtype) -> str:
    with pytest.raises(ConfigError) as caught:
        open_sage(device, dtype)
    return str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is not None, reason="the package is installed")
def test_a_package_that_is_missing_is_named() -> None:
    assert "CFG-324" in refused(CUDA, torch.bfloat16) and PACKAGE in refused(CUDA, torch.bfloat16)


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)])
def test_it_has_no_kernel_for_every_place(device: torch.device, dtype: torch.dtype, package: None) -> None:
    assert "CFG-325" in refused(device, dtype)


def test_it_takes_the_place_of_exact_attention_among_the_videos_tokens(package: None) -> None:
    attend = open_sage(CUDA, torch.bfloat16)
    q, k, v = q_k_v()
    whole, padded = Segments((Segment(6, 6),)), Segments((Segment(5, 6),))
    torch.testing.assert_close(
        partial(self_attention, attend=attend)(q, k, v, whole), 2 * self_attention(q, k, v, whole)
    )
    of_ranks = context_attention(ContextGroups(None, None, None, 1), attend)(q, k, v, padded)
    torch.testing.assert_close(
        of_ranks[:, :5], 2 * self_attention(*(x[:, :5] for x in (q, k, v)), Segments((Segment(5, 5),)))
    )
    assert (of_ranks[:, 5:] == 0).all()


def test_nothing_goes_backward_through_it(package: None) -> None:
    attend = open_sage(CUDA, torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in q_k_v())
    with pytest.raises(ConfigError, match="CFG-326"):
        attend(q, k, v)
    with torch.no_grad():
        assert attend(q, k, v).shape == q.shape
