"""DiffSynth-Studio's train.py for Wan, with its arguments: for accelerate launch, torchrun or python. See --help.

Works from any folder and without installing. Only what Python has imported by itself is imported here, because Python
looks into this script's folder first; `mm/isolated.py` says why and runs the command.
"""

import os
import sys

ROOT = os.path.abspath(__file__).rsplit(os.sep, 4)[0]

if __name__ == "__main__":
    command = [sys.executable, os.path.join(ROOT, "mm", "isolated.py"), "mm.cli.diffsynth_train", *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606  no shell is wanted
