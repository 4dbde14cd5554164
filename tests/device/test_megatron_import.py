"""megatron-core's import: what training leaves out, and that what it put off is still compiled."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from mm.device.megatron_import import _compile_at_first_call

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import torch
before = torch.compile
import mm.train.loop
assert "megatron.core" in sys.modules
assert torch.compile is before
left_out = ("torch._inductor.compile_fx", "torch._dynamo", "diffusers", "transformers")
print([name for name in left_out if name in sys.modules])
"""


def test_training_starts_without_a_compiler_and_the_libraries_of_encoders() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_is_put_off_is_compiled_once_and_computes_the_same() -> None:
    graphs = []

    def backend(graph: nn.Module, inputs: list[Tensor]) -> nn.Module:
        graphs.append(graph)
        return graph

    @_compile_at_first_call(backend=backend)
    def gelu(x: Tensor) -> Tensor:
        """A name to keep."""
        return nn.functional.gelu(x) + 1

    assert gelu.__doc__ == "A name to keep." and not graphs
    x = torch.linspace(-3, 3, 7)
    expected = nn.functional.gelu(x) + 1
    assert torch.equal(gelu(x), expected) and torch.equal(gelu(x), expected)
    assert len(graphs) == 1


def test_megatron_is_imported_where_its_decorators_are_put_off() -> None:
    packages = [ROOT / "mm" / "parallel", ROOT / "mm" / "optim"]
    assert all("import_megatron()" in (package / "__init__.py").read_text() for package in packages)
    importing = [
        file
        for file in (ROOT / "mm").rglob("*.py")
        if any(line.startswith(("import megatron", "from megatron")) for line in file.read_text().splitlines())
    ]
    assert importing and {file.parent for file in importing} <= set(packages)
