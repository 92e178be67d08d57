#!/usr/bin/env bash
# Interpretable reward, from ratings and preference pairs to a report: prepare, regression, gating, benchmarks, examples.
#
#   RATED=rated.safetensors PAIRS=pairs.safetensors VERBOSITY=length bash studies/interpretable.sh
#   PREPARE=1 RATED=EMBD_x.npy LABELS=ATTRIBUTES_x.npy PROMPT_EMBEDDINGS=PROMPTEMBD_x.npy PAIRS_FROM=helpfulness \
#     DOMAINS='llmbar=llmbar.npz;safety=safety.npz' bash studies/interpretable.sh
#   PREPARE=1 MODEL=google/gemma-2b-it RATED=ratings.jsonl PAIRS=preferences.jsonl REWARDBENCH=allenai/reward-bench@filtered \
#     bash studies/interpretable.sh
#
# Finished work whose settings and inputs are unchanged is skipped; FORCE=1 does it again. studies/README.md explains
# every setting. Lists are separated by semicolons.
set -euo pipefail

OUTPUT_DIR=${OUTPUT_DIR:-interpretable_out}
FORCE=${FORCE:-0}
SEED=${SEED:-6}

# data: prepared .safetensors; with PREPARE=1 also EMBD_*.npy, .npz and chat data (.jsonl, a folder, hub name, @SPLIT)
PREPARE=${PREPARE:-0}
PREPARED_DIR=${PREPARED_DIR:-$OUTPUT_DIR/prepared}
RATED=${RATED:-}
PAIRS=${PAIRS:-}
REWARDBENCH=${REWARDBENCH:-}
PRIOR_SETS=${PRIOR_SETS:-}
DOMAINS=${DOMAINS:-}
STYLES=${STYLES:-}
BEST_OF=${BEST_OF:-}

# of RATED=EMBD_*.npy
LABELS=${LABELS:-}
ATTRIBUTE_NAMES=${ATTRIBUTE_NAMES:-}
PROMPT_EMBEDDINGS=${PROMPT_EMBEDDINGS:-}

# no PAIRS: pairs from the ratings, of the prompts that the regression does not use
PAIRS_FROM=${PAIRS_FROM:-}
SHARE=${SHARE:-0.5}
MIN_GAP=${MIN_GAP:-0}
PAIRS_PER_PROMPT=${PAIRS_PER_PROMPT:-10}

# chat data
MODEL=${MODEL:-}
CHAT_TEMPLATE=${CHAT_TEMPLATE:-}
MAX_LENGTH=${MAX_LENGTH:-4096}
BATCH_TOKENS=${BATCH_TOKENS:-16384}
DTYPE=${DTYPE:-auto}
STORAGE_DTYPE=${STORAGE_DTYPE:-float32}

ATTRIBUTES=${ATTRIBUTES:-}
LABEL_KIND=${LABEL_KIND:-ratings}
INTERCEPT=${INTERCEPT:-0}
VERBOSITY=${VERBOSITY:-verbosity}
THRESHOLD=${THRESHOLD:-0.03}
PENALTY_SEARCH=${PENALTY_SEARCH:-root}
ALLOW_UNREACHED=${ALLOW_UNREACHED:-0}
REFERENCE=${REFERENCE:-}

DROP=${DROP:-}
FREEZE=${FREEZE:-}
TEMPERATURE=${TEMPERATURE:-10}
DROPOUT=${DROPOUT:-0.2}
HIDDEN=${HIDDEN:-1024;1024;1024}
EPOCHS=${EPOCHS:-20}
LEARNING_RATE=${LEARNING_RATE:-0.001}

EXPLAIN=${EXPLAIN-pairs=0}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=driver.sh
source "$here/driver.sh"

for name in PREPARE FORCE INTERCEPT ALLOW_UNREACHED; do one_of "$name" 0 1; done
[ -n "$RATED" ] || refuse "RATED: expected a prepared file of ratings (or, with PREPARE=1, what to make it of), found none"
[ -n "$PAIRS$PAIRS_FROM" ] || refuse "PAIRS: expected preference pairs, or PAIRS_FROM with an attribute of RATED, found none"
[ -z "$PAIRS" ] || [ -z "$PAIRS_FROM" ] || refuse "PAIRS_FROM: expected no PAIRS beside it, found both; leave one of them out"
if [ -n "$LABELS$ATTRIBUTE_NAMES$PROMPT_EMBEDDINGS" ] && [ "${RATED%.npy}" = "$RATED" ]; then
  refuse "LABELS, ATTRIBUTE_NAMES, PROMPT_EMBEDDINGS: expected RATED=EMBD_*.npy beside them, found '$RATED'; leave them out"
fi

split_list() { # TEXT: sets list to its parts between semicolons
  IFS=';' read -r -a list <<<"$1"
}

# The stages are collected first, so that all of their arguments can be checked before the first one starts.
stages=()
chat=0

plan() { # NAME SCRIPT ARGUMENT...
  stages+=("$1" "$2" $(($# - 2)) "${@:3}")
}

prepared() { # SETTING NAME INPUT: sets file to the prepared file, planning what makes it
  local setting=$1 name=$2 input=$3 flags=(--seed "$SEED")
  file=$PREPARED_DIR/$name.safetensors
  case $input in
    *.safetensors)
      file=$input
      compgen -G "$file" >/dev/null || refuse "$setting: $file: expected a prepared file (or shards), found none"
      return
      ;;
    *.npy | *.npz | *.jsonl) [ -f "$input" ] || refuse "$setting: $input: expected a file, found none" ;;
  esac
  [ "$PREPARE" = 1 ] || refuse "$setting: expected a prepared .safetensors file, found '$input'; PREPARE=1 makes one of it"
  case $input in
    *.npy | *.npz)
      flags+=(--source arrays --embeddings "$input")
      [ -z "$MODEL" ] || flags+=(--model "$MODEL")
      if [ "$setting" = RATED ] && [ "${input%.npy}" != "$input" ]; then
        [ -n "$LABELS" ] || refuse "LABELS: expected ATTRIBUTES_*.npy for RATED=$input, found none"
        flags+=(--labels "$LABELS")
        [ -z "$ATTRIBUTE_NAMES" ] || flags+=(--attribute_names "$ATTRIBUTE_NAMES")
        [ -z "$PROMPT_EMBEDDINGS" ] || flags+=(--prompt_embeddings "$PROMPT_EMBEDDINGS")
      fi
      ;;
    *)
      chat=1
      [ -n "$MODEL" ] || refuse "MODEL: expected the model that embeds $setting=$input, found none"
      if [ -e "$input" ] || [ "${input%@*}" = "$input" ]; then
        flags+=(--dataset "$input")
      else
        flags+=(--dataset "${input%@*}" --dataset_split "${input##*@}")
      fi
      [ -z "$CHAT_TEMPLATE" ] || flags+=(--chat_template "$CHAT_TEMPLATE")
      flags+=(--model "$MODEL" --max_length "$MAX_LENGTH" --batch_tokens "$BATCH_TOKENS")
      flags+=(--dtype "$DTYPE" --storage_dtype "$STORAGE_DTYPE")
      # of pairs, concept labels are kept where they are asked for
      if [ "$setting" = RATED ] && [ "$LABEL_KIND" = pairwise ] && [ -n "$ATTRIBUTES" ]; then
        split_list "$ATTRIBUTES"
        flags+=(--attributes "${list[@]}")
      fi
      ;;
  esac
  plan "prepare-$name" studies/interpretable_prepare.py "${flags[@]}" --output "$file"
}

benchmarks() { # SETTING FLAG NAME=FILE;...: adds to bench_flags
  local setting=$1 flag=$2 item files=()
  split_list "$3"
  for item in ${list[@]+"${list[@]}"}; do
    [[ $item == ?*=?* && ${item%%=*} != */* ]] || refuse "$setting: expected NAME=FILE;NAME=FILE, found '$item'"
    prepared "$setting" "benchmark-${item%%=*}" "${item#*=}"
    files+=("${item%%=*}=$file")
    known+=("${item%%=*}=$file")
  done
  [ ${#files[@]} = 0 ] || bench_flags+=("$flag" "${files[@]}")
}

known=() bench_flags=()
prepared RATED rated "$RATED"
rated=$file
if [ -n "$PAIRS" ]; then
  prepared PAIRS pairs "$PAIRS"
  pairs=$file
else
  part=(--source prepared --prepared "$rated" --share "$SHARE" --seed "$SEED")
  rated=$PREPARED_DIR/rated-first.safetensors
  pairs=$PREPARED_DIR/pairs-from-second.safetensors
  plan prepare-first studies/interpretable_prepare.py "${part[@]}" --prompts first --output "$rated"
  plan prepare-pairs studies/interpretable_prepare.py "${part[@]}" --prompts second --pairs_from "$PAIRS_FROM" \
    --min_gap "$MIN_GAP" --pairs_per_prompt "$PAIRS_PER_PROMPT" --output "$pairs"
fi
known+=("rated=$rated" "pairs=$pairs")
if [ -n "$REWARDBENCH" ]; then
  prepared REWARDBENCH rewardbench "$REWARDBENCH"
  bench_flags+=(--pairs "$file")
  known+=("rewardbench=$file")
fi
if [ -n "$PRIOR_SETS" ]; then
  prepared PRIOR_SETS prior_sets "$PRIOR_SETS"
  bench_flags+=(--prior_sets "$file")
fi
benchmarks DOMAINS --domains "$DOMAINS"
benchmarks STYLES --styles "$STYLES"
benchmarks BEST_OF --groups "$BEST_OF"

regression=(--data "$rated" --labels "$LABEL_KIND" --intercept "$INTERCEPT" --verbosity_attribute "$VERBOSITY")
regression+=(--threshold "$THRESHOLD" --penalty_search "$PENALTY_SEARCH" --seed "$SEED" --output_dir "$OUTPUT_DIR")
[ "$ALLOW_UNREACHED" = 0 ] || regression+=(--allow_unreached)
if [ -n "$ATTRIBUTES" ]; then
  split_list "$ATTRIBUTES"
  regression+=(--attributes "${list[@]}")
fi
if [ -n "$REFERENCE" ]; then
  prepared REFERENCE reference "$REFERENCE"
  regression+=(--reference "$file")
fi
plan regression studies/interpretable_regression.py "${regression[@]}"

gating=(--pairs "$pairs" --model_dir "$OUTPUT_DIR" --temperature "$TEMPERATURE" --dropout "$DROPOUT")
gating+=(--epochs "$EPOCHS" --learning_rate "$LEARNING_RATE" --seed "$SEED")
split_list "$HIDDEN"
gating+=(--hidden "${list[@]}")
for name in DROP FREEZE; do
  split_list "${!name}"
  [ ${#list[@]} = 0 ] || gating+=("--$(echo "$name" | tr '[:upper:]' '[:lower:]')" "${list[@]}")
done
plan gating studies/interpretable_gating.py "${gating[@]}"
if [ ${#bench_flags[@]} -gt 0 ]; then
  plan rewardbench studies/rewardbench.py "${bench_flags[@]}" --model_dir "$OUTPUT_DIR" --seed "$SEED"
fi

split_list "$EXPLAIN"
for item in ${list[@]+"${list[@]}"}; do
  file=
  for one in "${known[@]}"; do
    [ "${one%%=*}" != "${item%%=*}" ] || file=${one#*=}
  done
  [ -n "$file" ] && [[ $item == ?*=?* ]] ||
    refuse "EXPLAIN: expected NAME=ROW or NAME=SUBSET with NAME among ${known[*]%%=*}, found '$item'"
  if [[ ${item#*=} =~ ^[0-9]+$ ]]; then what=(--index "${item#*=}"); else what=(--subset "${item#*=}"); fi
  plan "explain-${item//[^[:alnum:]_.-]/-}" studies/interpretable_explain.py --data "$file" "${what[@]}" \
    --model_dir "$OUTPUT_DIR"
done

packages=(torch numpy scipy scikit-learn joblib orjson tqdm matplotlib safetensors jinja2)
extra=
if [ "$chat" = 1 ]; then
  packages+=(transformers datasets)
  extra="[llm]"
fi
choose_python "$extra" "${packages[@]}"
export PYTHONUNBUFFERED=1 FORCE PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

# Preflight: the arguments of every stage are parsed, and models looked up, before the first stage starts.
"$PY" -c '
import importlib, sys
from rewardlib import artifacts
from rewardlib.cli import console
from rewardlib.llm import loading
def check():
    rest, models = sys.argv[2:], set()
    while rest:
        name, script, n = rest[:3]
        args = importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(rest[3 : 3 + int(n)])
        models |= {args.model} if getattr(args, "source", None) == "chat" else set()
        rest = rest[3 + int(n) :]
    for model in models:
        loading.fingerprint(model)
    artifacts.writable_dir(sys.argv[1])
console.run(check, "interpretable.sh")
' "$OUTPUT_DIR" "${stages[@]}"
mkdir -p "$OUTPUT_DIR/logs"

lock_output

set -- "${stages[@]}"
while (($#)); do
  stage "$1" "$here/$2" "${@:4:$3}"
  shift $((3 + $3))
done
stage report "$here/studies/interpretable_report.py" "$OUTPUT_DIR"
