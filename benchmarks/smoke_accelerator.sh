#!/usr/bin/env bash
# The first run on an accelerator (CUDA or NPU), in under four minutes: whether each part of the program works there.
#   bash benchmarks/smoke_accelerator.sh [--json FILE] [--only NAME ...] [--limit-s SECONDS]
#   PYTHON=python3 bash benchmarks/smoke_accelerator.sh      with another interpreter than .venv's
# On a machine without one the same steps run small on the CPU, and what needs a device says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/smoke.py one "$@"
