#!/usr/bin/env bash
# Makes .venv in the project's root and installs the pinned dependencies, once; later calls return at once.
#   PYTHON=python3.11 bash tools/setup_env.sh      chooses the interpreter (3.10 to 3.12)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}

"$python" - <<'PY' || { echo "error ENV-001: Python 3.10 to 3.12 is needed. Fix: PYTHON=/path/to/python bash $0" >&2; exit 64; }
import sys
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PY

stamp=.venv/installed
wanted=$(cat setup.py constraints.txt | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

echo "Setting up $root/.venv (a few minutes the first time)"
"$python" -m venv .venv || { echo "error ENV-002: no venv module. Fix: apt-get install python3-venv" >&2; exit 64; }
# torch first and pinned: a later requirement must never pull another build of it.
.venv/bin/python -m pip install --quiet "torch==2.13.0"
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
echo "$wanted" > "$stamp"
