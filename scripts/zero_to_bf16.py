"""Write the weights of a training checkpoint in bf16: zero_to_bf16.py CHECKPOINT_DIR OUTPUT_DIR. See --help.

Works from any folder and without installing. Only what Python has imported by itself is imported here, because Python
looks into this script's folder first; `mm/isolated.py` says why and runs the command.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

if __name__ == "__main__":
    command = [sys.executable, os.path.join(ROOT, "mm", "isolated.py"), "mm.cli.zero_to_bf16", *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606  no shell is wanted
