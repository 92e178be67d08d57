# shellcheck shell=bash
# Sourced by run_all.sh, run_tests.sh and studies/interpretable.sh: what these commands share.
#
# choose_python EXTRA PACKAGE... sets PY to a Python that has the packages. PYTHON, where it is set, must have them. Else an
# active environment that has them is used as it is; else .venv beside this file, which is made or completed with pip
# (EXTRA: extras of pyproject.toml such as "[dev]", or "").

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
  if [ -n "${PYTHON:-}" ]; then
    has_packages "$PYTHON" "$@" || {
      echo "PYTHON=$PYTHON: expected Python 3.10 or newer with $*, found one without; install them or unset PYTHON" >&2
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

refuse() { # MESSAGE...
  echo "${0##*/}: $*" >&2
  exit 2
}

one_of() { # NAME VALUE...
  local name=$1 value=${!1} allowed
  shift
  for allowed in "$@"; do [ "$value" = "$allowed" ] && return; done
  refuse "$name: expected one of $*, found '$value'"
}

# The lock is on descriptor 9, which every stage inherits: it ends with the last of them, whatever happens to this shell.
lock_output() {
  exec 9>>"$OUTPUT_DIR/.lock"
  "$PY" -c 'import sys; from rewardlib import artifacts; artifacts.take_lock(9, sys.argv[1])' "$OUTPUT_DIR"
  export REWARDLIB_LOCKED_DIR=$OUTPUT_DIR
}

stage() { # NAME ARGUMENT...
  local name=$1 log=$OUTPUT_DIR/logs/$1.log started=$SECONDS status=0
  shift
  printf '\n==> %s:' "$name"
  printf ' %q' "$PY" "$@"
  printf '\n'
  "$PY" "$@" 2>&1 | tee "$log" || status=$?
  if ((status)); then
    {
      printf '\n%s: %s failed after %s s; its last lines:\n' "${0##*/}" "$name" $((SECONDS - started))
      tail -n 8 "$log" | sed 's/^/    /'
      printf 'the whole log: %s\nthe same command goes on from here; what is finished is skipped\n' "$log"
    } >&2
    exit "$status"
  fi
}
