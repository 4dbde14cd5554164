"""What an example script gives to its program, without the program."""

import os
import subprocess
from pathlib import Path

RECORDER = '#!/bin/bash\nprintf "%s\\0" "$@" >"$WORDS"\n'


def words_of(script: Path, folder: Path, *words: str, **environment: str) -> tuple[Path, str, list[str]]:
    """The file that Python is started with, the module and its words, by a `python` that writes them down."""
    recorder = folder / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    told = {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder), "WORDS": str(folder / "words")}
    done = subprocess.run(
        ["bash", str(script), *words], env={**os.environ, **told, **environment},
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    program, module, *rest = (folder / "words").read_text().split("\0")[:-1]
    return Path(program), module, rest
