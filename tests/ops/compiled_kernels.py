"""Compiles every kernel of the Triton operators for an H200 (compute capability 9.0), on a machine without one.

    python tests/ops/compiled_kernels.py WIDTH [WIDTH ...]

prints, as JSON by kernel and width, the registers of a thread, its bytes of local memory (what did not fit into
registers), the bytes of shared memory, and the kernel's PTX. What the operators start is compiled instead, for the
arguments and with the specialisations that Triton would choose, so that a mismatch between a kernel and its start is
found as well.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mm.ops.elementwise import triton_operators
from mm.ops.elementwise.operators import HeadNorm, identity

TOKENS, HEAD_DIM, EPS = 2, 128, 1e-6
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
found: dict[str, dict[str, Any]] = {}


def type_of(argument: Any) -> str:
    """As Triton names it."""
    if argument is None:
        return "constexpr"
    return POINTERS[argument.dtype] if isinstance(argument, Tensor) else {int: "i32", float: "fp32"}[type(argument)]


def compile_only(
    kernel: Any, grid: tuple[int, int], warps: int, x: Tensor, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """In place of `triton_operators._start`."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    assert given.keys() == set(kernel.arg_names), f"{kernel.__name__}: {sorted(given)} for {kernel.arg_names}"
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = given[name]
        signature[name] = "constexpr" if name in constants else type_of(value)
        if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    fixed = {(kernel.arg_names.index(name),): given[name] for name, of in signature.items() if of == "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    of = "all heads" if constants.get("WHOLE", True) else "a part of the heads"
    name = f"{kernel.__name__} of {of}, {x.shape[2]} wide"
    found[name] = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "local": sum(int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("LOCAL", "STACK")),
        "threads": 32 * warps,
        "shared": compiled.metadata.shared,
        "ptx": compiled.asm["ptx"],
    }


def compile_operators(width: int) -> None:
    operators = triton_operators.TritonOperators(programs=1)
    x = torch.zeros(1, TOKENS, width, dtype=torch.bfloat16)
    row, statistic = torch.zeros(1, 1, width), torch.zeros(1, TOKENS, 1)
    angles = torch.zeros(TOKENS, HEAD_DIM // 2)
    operators.layer_norm(x, row, row, EPS)
    operators.layer_norm_backward(x, x, row, statistic, statistic)
    operators.gated_residual(x, x, row)
    operators.gated_residual_backward(x, x, row)
    for sum_over_ranks in (identity, torch.clone):
        weight, heads = x[0, 0].clone(), x.unflatten(-1, (-1, HEAD_DIM))
        norm = HeadNorm(HEAD_DIM, EPS, width, sum_over_ranks)
        operators.rms_norm_rope(x, weight, (angles, angles), norm)
        operators.rms_norm_rope_backward(heads, x, weight, (angles, angles), statistic, norm)


if __name__ == "__main__":
    triton_operators._start = compile_only
    for width in sys.argv[1:]:
        compile_operators(int(width))
    print(json.dumps(found))
