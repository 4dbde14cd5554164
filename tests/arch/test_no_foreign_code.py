"""No call in the package can run code that a file, a folder or a peer brings along; found in the source by ast.

Standard input is never read, so that no library's question can be answered by whatever happens to stand there.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_rules import ROOT, SCRIPTS, SOURCES, each

CHECKED = [*SOURCES, *SCRIPTS, *sorted((ROOT / "benchmarks").rglob("*.py"))]
LOADERS = {"from_pretrained", "from_single_file", "load_config"}
OURS = {"VideoEncoder", "TextEncoder", "ImageEncoder", "WanModel"}
CONCRETE = {
    # load_strictly's class, which its callers name; it looks through the folder first
    ("mm/wan/component.py", "model_class.from_pretrained"),
}
OUR_CODE = {
    # this checkout's package and its commands, by path, so that no other folder's are taken for them
    ("mm/isolated.py", "importlib.util.spec_from_file_location"),
    ("mm/isolated.py", "runpy.run_module"),
    # the file that whoever measures names as the version before
    ("benchmarks/video_reading.py", "importlib.util.spec_from_file_location"),
}
AUTO = re.compile(r"Auto[A-Z]\w*|DiffusionPipeline|pipeline")
"""Classes that choose by what a folder says which code to run."""
TRUST = {"trust_remote_code", "allow_pickle", "custom_pipeline"}
NEVER = {
    "input", "eval", "exec", "__import__", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.hub.load",
    "torch.jit.load", "torch.export.load", "torch.ops.load_library", "torch.classes.load_library", "ctypes.CDLL",
    "importlib.util.spec_from_file_location", "runpy.run_path", "runpy.run_module", "pd.read_pickle",
}  # fmt: skip
UNPICKLE = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
"""torch's collectives of objects, which unpickle what a peer sent."""


def complaints(source: str, path: str = "mm/x.py") -> Iterator[str]:
    """What is wrong with a file, as `line: text`."""
    tree = ast.parse(source)
    safe_yaml = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, node.bases)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.stdin" and path != "mm/cli/entry.py":
            yield f"{node.lineno}: standard input, which the commands close"
        if isinstance(node, ast.keyword) and node.arg in TRUST and ast.unparse(node.value) != "False":
            yield f"{node.value.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            wrong = _wrong_call(node, safe_yaml, path)
            if wrong:
                yield f"{node.lineno}: {wrong}"


def _wrong_call(node: ast.Call, safe_yaml: set[str], path: str) -> str | None:
    called = ast.unparse(node.func)
    owner, _, name = called.rpartition(".")
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in NEVER and (path, called) not in OUR_CODE:
        return called
    if name in UNPICKLE and owner in {"dist", "torch.distributed", "distributed_c10d"}:
        return f"{called} unpickles"
    if AUTO.fullmatch(owner) and name.startswith("from_") and given.get("trust_remote_code") != "False":
        return f"{called} without trust_remote_code=False"
    known = owner in OURS | {"cls", ""} or AUTO.fullmatch(owner) or (path, called) in CONCRETE
    if name in LOADERS and path.startswith("mm/") and not known:
        return f"{called}: load models through mm.wan.component.load_strictly"
    if called == "yaml.load" and given.get("Loader") not in safe_yaml:
        return "yaml.load without a SafeLoader"
    if called == "importlib.import_module":
        text = ast.unparse(node.args[0])
        if not re.match(r"f?['\"](mm\.|torch_npu)", text):
            return f"importlib.import_module({text})"
    return None


@each(CHECKED)
def test_no_call_runs_foreign_code(path: Path) -> None:
    assert list(complaints(path.read_text(), path.relative_to(ROOT).as_posix())) == []


@pytest.mark.parametrize(
    "line",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=trust)",
        "DiffusionPipeline.from_pretrained(folder)",
        "UMT5EncoderModel.from_pretrained(folder)",
        "UniPCMultistepScheduler.load_config(folder)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "answer = input('run it?')",
        "sys.stdin.readline()",
        "dist.all_gather_object(out, mine)",
        "importlib.import_module(name)",
        "torch.jit.load(file)",
    ],
)
def test_such_calls_are_found(line: str) -> None:
    assert list(complaints(line))
