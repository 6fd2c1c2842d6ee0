#!/usr/bin/env bash
# On a machine with a GPU: is the fused kernel right there, and how fast? Needs a Python with torch and triton; installs
# nothing. Options go to gpu_check.py; PYTHON names another interpreter. Exit status 1 if a check failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/tests/gpu_check.py" "$@"
