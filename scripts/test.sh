#!/usr/bin/env bash
# Makes a virtual environment, installs diffrep with its test tools, and runs lint and all tests. Arguments go to pytest.
EXTRAS=dev
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
ruff format --check .
exec python -m pytest "$@"
