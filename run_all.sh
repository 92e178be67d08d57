#!/usr/bin/env bash
# From embeddings to a validated, calibrated student: steps 5 to 8 on DATA_DIR, on demo data where there is none.
# RUN_GPU_STEPS=1 makes the embeddings first, from prompts: steps 1 to 4.
#
#   bash run_all.sh                                              demo data, default settings
#   DATA_DIR=mydata RM_OBJECTIVE=clf OUTPUT_DIR=out bash run_all.sh
#   USE_REPO_EMBD=1 EMBD_REPO_DIR=embd/RM-Embeddings TASK=harmless DATA_DIR=data/harmless bash run_all.sh
#   PAIRS=preferences.npz bash run_all.sh                        recorded preferences: steps 5 and 6
#   START_STEP=7 STOP_STEP=8 DISTILL_EPOCHS=40 bash run_all.sh   part of the chain
#
# A setting is an environment variable: the name of a step's flag in capitals. docs/settings.md lists all of them with
# their defaults. What is finished, with the same settings and inputs, is skipped; FORCE=1 repeats it.
set -euo pipefail

# shellcheck source=driver.sh
source "$(dirname "${BASH_SOURCE[0]}")/driver.sh"

packages=() extra=
case ${RUN_GPU_STEPS:-}/${START_STEP:-} in
  1/[5-8]) ;;
  1/*) # steps 1 to 4 need language models
    packages=(transformers peft trl datasets accelerate)
    extra="[llm]"
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
      packages+=(vllm)
      extra="[gpu]"
    fi
    ;;
esac
choose_python "$extra" ${packages[@]+"${packages[@]}"}
run_chain rewardlib.cli.chain "$@"
