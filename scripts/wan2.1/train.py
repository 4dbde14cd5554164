"""VideoX-Fun's scripts/wan2.1/train.py, with its words; `mm.cli.videox_fun` does the work. See --help.

Works from any folder and without installing. Only what Python has imported by itself is imported here, because Python
looks into this script's folder first; `mm/isolated.py` says why and runs the command.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    words = ["mm.cli.videox_fun", os.path.realpath(__file__), *sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, os.path.join(ROOT, "mm", "isolated.py"), *words])  # noqa: S606
