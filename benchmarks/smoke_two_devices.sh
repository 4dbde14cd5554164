#!/usr/bin/env bash
# Layouts on two devices against one, over NCCL or HCCL: ring, Ulysses, tensor parallelism, a virtual pipeline, layer-zero.
#   bash benchmarks/smoke_two_devices.sh [--json FILE] [--only NAME ...] [--limit-s SECONDS]
#   PYTHON=python3 bash benchmarks/smoke_two_devices.sh      with another interpreter than .venv's
# On a machine without any it runs two processes on the CPU over gloo; with one it says that it needs two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/smoke.py two "$@"
