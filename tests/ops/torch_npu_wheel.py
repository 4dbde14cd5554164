"""The published torch_npu wheel as a source of facts: operator schemas, shape functions, the API of `torch.npu`.

It is downloaded once a machine and read as a zip; nothing of it is installed or loaded. The schemas are made operators
of this torch (`torch.ops.npu`), so a call that torch_npu would refuse is refused here, by the same dispatcher.
"""

import ast
import contextlib
import inspect
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

VERSION = torch.__version__.split("+")[0]  # a torch_npu belongs to the torch of its number
_SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
_LISTED = "torch_npu/csrc/aten/npu_native_functions.yaml"
_SHAPES = "torch_npu/op_plugin/meta/_meta_registrations.py"
# the published Python files are the same for all platforms
_PLATFORM = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311",
             "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:"]  # fmt: skip


class UnreachableError(Exception):
    """The wheel is neither on this machine nor to be had."""


def download(timeout_s: float = 120) -> Path:
    """The wheel of this torch's version, 44 MB, from the cache or from the package index.

    Raises:
        UnreachableError: with pip's words, or after the time limit.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm-tests"
    folder = cache / f"torch_npu-{VERSION}"
    if not folder.exists():
        partial = cache / f"torch_npu-{VERSION}.{os.getpid()}"
        words = ["download", "--no-deps", "--quiet", *_PLATFORM, "-d", str(partial), f"torch_npu=={VERSION}"]
        try:
            subprocess.run(
                [sys.executable, "-m", "pip", *words], check=True, timeout=timeout_s, capture_output=True, text=True
            )
            partial.rename(folder)
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"no torch_npu {VERSION} from the package index in {timeout_s} s") from None
        except subprocess.CalledProcessError as failure:
            raise UnreachableError(f"pip could not download torch_npu {VERSION}: {failure.stderr[-500:]}") from None
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return next(folder.glob("*.whl"))


class Wheel:
    """What tests ask of a wheel."""

    def __init__(self, path: Path) -> None:
        self._files = zipfile.ZipFile(path)
        self._shapes = ast.parse(self.text(_SHAPES)).body

    def text(self, member: str) -> str:
        """A file of the wheel."""
        return self._files.read(member).decode()

    def schema(self, operator: str) -> str:
        """`name(Tensor self, ...) -> ...` of one operator."""
        (line,) = re.findall(rf"^[ -]*func: ({operator}\(.*)$", self.text(_SCHEMAS), re.MULTILINE)
        return str(line)

    def kernels(self) -> set[str]:
        """Names of torch's operators that torch_npu implements, as "add.Tensor" or "mm"."""
        listed = self.text(_SCHEMAS) + self.text(_LISTED)
        return set(re.findall(r"^[ -]*(?:func: )?(\w[\w.]*)(?:\(.*)?$", listed, re.MULTILINE))

    def shape_function(self, operator: str) -> Callable[..., Any]:
        """The wheel's own function from meta tensors to meta tensors, cut out of the file that registers it."""
        named = {name: node for node in self._shapes for name in _names_bound(node)}
        (found,) = (
            node for node in self._shapes
            if isinstance(node, ast.FunctionDef) and any(_registers(mark, operator) for mark in node.decorator_list)
        )  # fmt: skip
        needed = _with_what_it_uses(found, named)
        # what the file imports from its compiled part: the number of the chip, here one of the A2 and A3 series
        scope: dict[str, Any] = {"torch": torch, "get_soc_version": lambda: 0, "impl": _unregistered, "m": None}
        code = ast.Module([node for node in self._shapes if node in needed], type_ignores=[])
        exec(compile(code, _SHAPES, "exec"), scope)
        return scope[found.name]  # type: ignore[no-any-return]

    def signature(self, member: str, function: str) -> inspect.Signature:
        """Of a function that a file of the wheel defines."""
        (found,) = (
            node for node in ast.parse(self.text(member)).body
            if isinstance(node, ast.FunctionDef) and node.name == function
        )  # fmt: skip
        for argument in [*found.args.args, *found.args.kwonlyargs]:
            argument.annotation = None
        scope: dict[str, Any] = {}
        exec(f"def {function}({ast.unparse(found.args)}): ...", scope)
        return inspect.signature(scope[function])


@contextlib.contextmanager
def defined(wheel: Wheel, operators: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """`torch.ops.npu` out of the wheel's schemas, for the length of a block.

    Args:
        wheel: on meta and fake tensors its shape functions answer.
        operators: for each name, what it computes on the CPU.
    """
    with torch.library._scoped_library("npu", "DEF") as schemas, torch.library._scoped_library("npu", "IMPL") as code:
        for name, formula in operators.items():
            schemas.define(wheel.schema(name))
            code.impl(name, wheel.shape_function(name), "Meta")
            code.impl(name, formula, "CPU")
        yield


def _unregistered(library: None, operator: str) -> Callable[..., Any]:
    """In the place of `torch.library.impl`, with which that file registers its functions."""
    return lambda function: function


def _registers(decorator: ast.expr, operator: str) -> bool:
    return ast.unparse(decorator) == f"impl(m, '{operator}')"


def _names_bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _with_what_it_uses(node: ast.stmt, named: dict[str, ast.stmt]) -> set[ast.stmt]:
    """A definition and the definitions of the same file that it reads."""
    needed, open_ends = {node}, [node]
    while open_ends:
        names = {part.id for part in ast.walk(open_ends.pop()) if isinstance(part, ast.Name)}
        new = {named[name] for name in names & named.keys() if name != "m"} - needed
        needed |= new
        open_ends += new
    return needed
