"""Convert Wan2.1 transformer weights, see `convert_ckpt.py --help`. The command is `mm.cli.convert`."""

import sys
from pathlib import Path

# From a checkout this works from any folder and without installing: the package lies beside this script's folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm.cli.convert import main
from mm.cli.entry import run

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
