#!/usr/bin/env bash
# Sets up .venv and runs the checks and the tests; words after it go to pytest (bash tests/run.sh -k rope).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy -n 2  # half a minute on one core in a fresh clone
# Two files at a time, in order: the quickstart, among the first, computes on one core for a minute.
if [ "$#" -eq 0 ]; then set -- -m "not nightly" -n 2 --dist loadfile --no-loadscope-reorder; fi
exec .venv/bin/python -m pytest "$@"
