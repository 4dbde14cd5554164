"""Convert Wan2.1 transformer weights, see `convert_ckpt.py --help`. The command is `mm.cli.convert`.

Works from any folder and without installing. Only what Python has imported by itself is imported here, because Python
looks into this script's folder first; `mm/isolated.py` says why and runs the command.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    command = [sys.executable, os.path.join(ROOT, "mm", "isolated.py"), "mm.cli.convert", *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606  no shell is wanted
