#!/usr/bin/env bash
# Makes a virtual environment, installs diffrep with its test tools, and runs lint and all tests. Arguments go to pytest.
EXTRAS=dev
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
ruff format --check .
# Tiny networks gain nothing from threads, so two processes of one thread each are nearly twice as fast.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n "${TEST_PROCESSES:-2}" "$@"
