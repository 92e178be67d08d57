#!/usr/bin/env bash
# Interpretable reward, from ratings and preference pairs to a report: prepare, regression, gating, benchmarks, examples.
#
#   RATED=rated.safetensors PAIRS=pairs.safetensors VERBOSITY=length bash studies/interpretable.sh
#   PREPARE=1 RATED=EMBD_x.npy LABELS=ATTRIBUTES_x.npy PROMPT_EMBEDDINGS=PROMPTEMBD_x.npy PAIRS_FROM=helpfulness \
#     DOMAINS='llmbar=llmbar.npz;safety=safety.npz' bash studies/interpretable.sh
#   PREPARE=1 MODEL=google/gemma-2b-it RATED=ratings.jsonl PAIRS=preferences.jsonl REWARDBENCH=allenai/reward-bench@filtered \
#     bash studies/interpretable.sh
#
# Settings are environment variables: studies/README.md explains them. Lists are separated by semicolons. What is
# finished, with the same settings and inputs, is skipped; FORCE=1 repeats it.
set -euo pipefail

# shellcheck source=driver.sh
source "$(dirname "${BASH_SOURCE[0]}")/../driver.sh"

has_conversations() { # ITEM...: whether one of the inputs is neither arrays nor prepared
  local item
  for item in "$@"; do
    case $item in '' | *.npy | *.npz | *.safetensors) ;; *) return 0 ;; esac
  done
  return 1
}

packages=() extra=
IFS=';' read -r -a items <<<"${RATED:-};${PAIRS:-};${REWARDBENCH:-};${PRIOR_SETS:-};${DOMAINS:-};${STYLES:-};${BEST_OF:-};${REFERENCE:-}"
if [ "${PREPARE:-}" = 1 ] && has_conversations "${items[@]}"; then # a language model embeds them
  packages=(transformers datasets)
  extra="[llm]"
fi
choose_python "$extra" ${packages[@]+"${packages[@]}"}
run_chain studies.interpretable.chain "$@"
