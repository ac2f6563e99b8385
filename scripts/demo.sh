#!/usr/bin/env bash
# Makes a virtual environment, installs diffrep and runs the demo. Arguments go to `diffrep demo`, such as --limit 500.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec diffrep demo "$@"
