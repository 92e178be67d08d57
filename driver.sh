# shellcheck shell=bash
# Sourced by run_all.sh, run_tests.sh and studies/interpretable.sh: how they find or make a Python.
#
# choose_python EXTRA PACKAGE... sets PY to a Python that has the core packages and PACKAGE.... Where PYTHON is
# set, that Python must have them. Else an active environment that has them is used as it is; else .venv
# beside this file, which is made or completed with pip (EXTRA: extras of pyproject.toml such as "[dev]", or "").

CORE_PACKAGES=(torch numpy scipy scikit-learn joblib orjson tqdm matplotlib safetensors jinja2)

has_packages() { # PYTHON PACKAGE...
  "$1" - "${@:2}" 2>/dev/null <<'PYTHON_CODE'
import importlib.metadata, sys
assert sys.version_info >= (3, 10)
for name in sys.argv[1:]:
    importlib.metadata.version(name)
assert [int(part) for part in importlib.metadata.version("torch").split(".")[:2]] == [2, 13]
PYTHON_CODE
}

choose_python() { # EXTRA PACKAGE...
  local extra=$1 here candidate base
  shift
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  set -- "${CORE_PACKAGES[@]}" "$@"
  if [ -n "${PYTHON:-}" ]; then
    has_packages "$PYTHON" "$@" || {
      echo "PYTHON=$PYTHON: expected Python 3.10 or newer with torch 2.13 and $*, found one without; install them or unset PYTHON" >&2
      return 2
    }
    PY=$PYTHON
    return
  fi
  for candidate in python3 python "$here/.venv/bin/python"; do
    if has_packages "$candidate" "$@"; then
      PY=$candidate
      return
    fi
  done
  base=
  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14)' 2>/dev/null; then
      base=$candidate
      break
    fi
  done
  if [ -z "$base" ]; then
    echo "expected Python 3.10 to 3.13 as python3, found none; install one or set PYTHON" >&2
    return 2
  fi
  echo "making $here/.venv with $("$base" --version) (first run only; some minutes)"
  "$base" -m venv "$here/.venv" || {
    echo "could not make $here/.venv; on Debian and Ubuntu: apt install python3-venv" >&2
    return 2
  }
  "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$here/constraints.txt" --editable "$here$extra" || {
    echo "could not install the packages into $here/.venv; the same command tries again" >&2
    return 2
  }
  # shellcheck disable=SC2034  # PY is the result
  PY=$here/.venv/bin/python
}

# run_chain MODULE ARGUMENT...: runs a chain of stages with PY and says how to go on where it was killed.
run_chain() {
  local here status=0
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  # safe path (Python 3.11): files of the working directory do not stand in for modules
  export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
  "$PY" -m "$@" || status=$?
  if ((status > 128 && status != 130)); then
    echo "${0##*/}: the run was killed (status $status); the same command goes on from there" >&2
  fi
  exit "$status"
}
