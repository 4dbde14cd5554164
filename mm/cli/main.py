"""`mm COMMAND ...`: finds the command and runs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mm.cli.entry import run
from mm.cli.version import version_text
from mm.errors import ConfigError
from mm.isolated import clean_path

COMMANDS = {
    "demo": "write the embedded default: a tiny Wan2.1, 16 clips with captions, and the files that configure a run",
    "extract": "turn videos and captions into features",
    "migrate": "take over features of MindSpeed-MM; migrate config, shards, entries: other things, see its --help",
    "data": "see what is trained on: data look; look after a store of shards: data status, repair, export, copy STORE",
    "train": "train on features",
    "run": "train, extract features or generate as a run.yaml says",
    "translate": "print the run.yaml that a command line means",
    "doctor": "say whether a run will work, what it costs; doctor data, parity, compare: features, a layout, two runs",
    "convert": "convert weights between the HF, native and MM formats",
    "generate": "make videos from prompts",
    "score": "measure what generated clips of the embedded default show",
    "plot": "draw a run's metrics as a PNG",
    "ui": "open a page on this computer to make clips and compare them",
}


def main(argv: Sequence[str]) -> None:
    """Dispatch to `mm.cli.<command>.main`.

    Raises:
        ConfigError: CFG-009 for a command that does not exist, and what the command raises.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: mm COMMAND [flags]; mm COMMAND --help lists a command's flags, mm --version the versions\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))
        return
    if list(argv) == ["--version"]:
        print(version_text())
        return
    if argv[0] not in COMMANDS:
        raise ConfigError("CFG-009", f'"{argv[0]}" is not a command.', f"Use one of {', '.join(COMMANDS)}.")
    importlib.import_module(f"mm.cli.{argv[0]}").main(argv[1:])


def process() -> None:
    """The `mm` executable."""
    clean_path()
    sys.exit(run(main, sys.argv[1:]))


if __name__ == "__main__":
    process()
