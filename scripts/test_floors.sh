#!/usr/bin/env bash
# Runs the tests on the lowest versions that pyproject.toml allows, torch apart, with the lowest Python. Arguments go to
# pytest.
#   FLOORS_VENV  the environment; default .venv-floors
#   TORCH_INDEX  where pip finds torch, when not in the usual place
#   TORCH_SITE   site-packages of another environment of the same Python, to take torch from: saves gigabytes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${FLOORS_VENV:-.venv-floors}"
lowest="$(sed -n 's/^requires-python = ">=\([0-9.]*\)"$/\1/p' pyproject.toml)"
if [ ! -f "$venv/bin/activate" ]; then # absent, or left half made
  rm -rf "$venv"
  "python$lowest" -m venv "$venv"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
if [ -n "${TORCH_SITE:-}" ]; then
  # What this environment has itself comes first.
  printf '%s\n' "$TORCH_SITE" > "$venv/lib/python$lowest/site-packages/zz_torch.pth"
fi
python scripts/floors.py > "$venv/floors.txt"
python -m pip install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint "$venv/floors.txt" -e ".[dev]"
python scripts/floors.py --check
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n "${TEST_PROCESSES:-2}" "$@"
