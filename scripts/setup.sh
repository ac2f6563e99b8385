# Sourced by demo.sh and test.sh: an environment with diffrep in it. Reuses an active virtual environment, else .venv.
#   EXTRAS  extras to install, such as "dev"
#   TORCH_INDEX  where pip finds torch, when not in the usual place
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  python="$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)"
  if [ ! -f .venv/bin/activate ]; then # absent, or left half made
    rm -rf .venv
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
# Installing again is skipped while pyproject.toml and the extras are what they were.
stamp="$VIRTUAL_ENV/.diffrep-installed"
want="$(cat pyproject.toml; echo "${EXTRAS:-} $PWD")"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
  echo "installing diffrep (torch is large: a few minutes the first time)"
  python -m pip install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -e ".${EXTRAS:+[$EXTRAS]}"
  printf '%s' "$want" > "$stamp"
fi
