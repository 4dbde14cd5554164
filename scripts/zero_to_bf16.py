"""Write the weights of a training checkpoint in bf16: zero_to_bf16.py CHECKPOINT_DIR OUTPUT_DIR. See --help."""

import sys
from pathlib import Path

# From a checkout this works from any folder and without installing: the package lies beside this script's folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm.cli.entry import run
from mm.cli.zero_to_bf16 import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
