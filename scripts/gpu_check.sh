#!/usr/bin/env bash
# Shows what only a GPU can: the gpu-marked tests, and all benches at a GPU's sizes; writes one JSON and one table.
#   scripts/gpu_check.sh [--cpu] [--only NAME ...] [--out runs/gpu_check] [--limit SECONDS]
#   EXTRAS=dev,xformers  with xformers, which torch's release must fit
EXTRAS="${EXTRAS:-dev}"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/gpu_check.py "$@"
