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
# Finished work whose settings and inputs are unchanged is skipped; FORCE=1 does it again. README.md explains every setting.
set -euo pipefail

RUN_GPU_STEPS=${RUN_GPU_STEPS:-0}
USE_REPO_EMBD=${USE_REPO_EMBD:-0}
EMBD_REPO_DIR=${EMBD_REPO_DIR:-embd/RM-Embeddings}
MAX_PROMPTS=${MAX_PROMPTS:-all}
DATA_DIR=${DATA_DIR:-data}
OUTPUT_DIR=${OUTPUT_DIR:-distill_out}
START_STEP=${START_STEP:-1}
STOP_STEP=${STOP_STEP:-8}
FORCE=${FORCE:-0}
SEED=${SEED:-6}

TASK=${TASK:-helpful}
case $TASK in helpful | harmless) default_dataset=hh-rlhf-$TASK-gpt4 ;; *) default_dataset= ;; esac
DATASET=${DATASET:-$default_dataset}
EVAL_DATASET=${EVAL_DATASET:-hh-rlhf-$TASK}
SFT_OBJ=${SFT_OBJ:-gpt4}
# from scratch, a MODEL_NAME given alone answers as well as embeds
if [ "$RUN_GPU_STEPS" = 1 ]; then GEN_PREF_MODEL=${GEN_PREF_MODEL:-${MODEL_NAME:-gemma7b}}; fi
MODEL_NAME=${MODEL_NAME:-gemma2b}
GEN_PREF_MODEL=${GEN_PREF_MODEL:-gemma7b}
REPO_GEN_MODEL=${REPO_GEN_MODEL:-gemma2b}

# RUN_GPU_STEPS=1: GEN_PREF_MODEL is fine-tuned and answers, REWARD_MODEL scores, MODEL_NAME embeds
REWARD_MODEL=${REWARD_MODEL:-}
ADAPTER_NAME=${ADAPTER_NAME:-sft}
N_TRAIN_RESPONSES=${N_TRAIN_RESPONSES:-10}
N_TEST_RESPONSES=${N_TEST_RESPONSES:-500}
MAX_LEN=${MAX_LEN:-128}
TEMPERATURE=${TEMPERATURE:-1.0}
TOP_P=${TOP_P:-0.95}
MAX_PROMPT_TOKENS=${MAX_PROMPT_TOKENS:-450}
MAX_LENGTH=${MAX_LENGTH:-1024}
BACKEND=${BACKEND:-auto}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.9}
BATCH_TOKENS=${BATCH_TOKENS:-16384}
DTYPE=${DTYPE:-auto}
POOLING=${POOLING:-last}
SFT_EPOCHS=${SFT_EPOCHS:-2}
SFT_LEARNING_RATE=${SFT_LEARNING_RATE:-0.00005}
SFT_BATCH_SIZE=${SFT_BATCH_SIZE:-8}
MAX_EXAMPLES=${MAX_EXAMPLES:-all}
SOURCE_DIR=${SOURCE_DIR:-data}
SFT_DIR=${SFT_DIR:-sft_models}
GEN_DIR=${GEN_DIR:-gen_data}

PAIRING=${PAIRING:-xprompt}
CONSIDER_FIRST_N=${CONSIDER_FIRST_N:-2}
N_SAMPLE=${N_SAMPLE:-100}
N_PAIRS=${N_PAIRS:-1}
ANNOTATION_QUALITY=${ANNOTATION_QUALITY:-10}
RM_MODEL=${RM_MODEL:-mlp}
RM_OBJECTIVE=${RM_OBJECTIVE:-bt}
PAIRS=${PAIRS:-}
ENSEMBLE_NUMBER=${ENSEMBLE_NUMBER:-10}
TRAINING_EPOCHS=${TRAINING_EPOCHS:-2}
LEARNING_RATE=${LEARNING_RATE:-0.001}
HIDDEN=${HIDDEN:-1024 512}
PRECISION=${PRECISION:-auto}
NUM_THREADS=${NUM_THREADS:-}
DISTILL_EPOCHS=${DISTILL_EPOCHS:-20}
STUDENT_LOSS=${STUDENT_LOSS:-hybrid}
RANKING_LAMBDA=${RANKING_LAMBDA:-1.0}
NORMALIZE_REWARDS=${NORMALIZE_REWARDS:-0}
BINARIZE_REWARDS=${BINARIZE_REWARDS:-0}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=driver.sh
source "$here/driver.sh"

for name in RUN_GPU_STEPS USE_REPO_EMBD NORMALIZE_REWARDS BINARIZE_REWARDS FORCE; do one_of "$name" 0 1; done
for name in START_STEP STOP_STEP; do one_of "$name" 1 2 3 3.5 4 5 6 7 8; done
[ "${START_STEP/./}" = "$START_STEP" ] || START_STEP=4
[ "${STOP_STEP/./}" = "$STOP_STEP" ] || STOP_STEP=3
((START_STEP <= STOP_STEP)) || refuse "START_STEP: expected at most STOP_STEP=$STOP_STEP, found $START_STEP"
[ -n "$DATASET" ] || refuse "TASK=$TASK: expected DATASET beside it (helpful and harmless have a default), found none"
if [ -n "$PAIRS" ]; then # recorded pairs have no golden rewards to calibrate to: steps 7 and 8 have nothing to do
  [ "$RUN_GPU_STEPS$USE_REPO_EMBD" = 00 ] || refuse "PAIRS: expected RUN_GPU_STEPS and USE_REPO_EMBD to be 0, found one of them 1"
  ((START_STEP <= 6)) || refuse "START_STEP: expected at most 6 with PAIRS, found $START_STEP"
  if ((START_STEP < 5)); then START_STEP=5; fi
  if ((STOP_STEP > 6)); then STOP_STEP=6; fi
fi
[ "$RUN_GPU_STEPS$USE_REPO_EMBD" != 11 ] || refuse "RUN_GPU_STEPS and USE_REPO_EMBD: expected at most one of them, found both"
packages=(torch numpy scipy scikit-learn joblib orjson tqdm matplotlib safetensors)
extra=
if [ "$RUN_GPU_STEPS" = 1 ] && ((START_STEP <= 4)); then
  packages+=(transformers peft trl datasets accelerate)
  extra="[llm]"
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    packages+=(vllm)
    extra="[gpu]"
  fi
fi
choose_python "$extra" "${packages[@]}"
export PYTHONUNBUFFERED=1 FORCE PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

if [ "$USE_REPO_EMBD" = 1 ]; then generating_model=$REPO_GEN_MODEL; else generating_model=$GEN_PREF_MODEL; fi
run_flags=(
  --task "$TASK" --embed_model_name "$MODEL_NAME" --sft_obj "$SFT_OBJ" --gen_pref_model_name "$generating_model"
  --pairing "$PAIRING" --consider_first_n "$CONSIDER_FIRST_N" --n_sample "$N_SAMPLE" --n_pairs "$N_PAIRS"
  --annotation_quality "$ANNOTATION_QUALITY" --rm_model "$RM_MODEL" --rm_objective "$RM_OBJECTIVE"
  --ensemble_number "$ENSEMBLE_NUMBER"
  --training_epochs "$TRAINING_EPOCHS" --learning_rate "$LEARNING_RATE" --precision "$PRECISION" --seed "$SEED"
  --data_dir "$DATA_DIR" --output_dir "$OUTPUT_DIR"
)
read -ra hidden <<<"$HIDDEN"
run_flags+=(--hidden "${hidden[@]}")
[ -z "$NUM_THREADS" ] || run_flags+=(--num_threads "$NUM_THREADS")
distill_flags=(
  --distill_epochs "$DISTILL_EPOCHS" --student_loss "$STUDENT_LOSS" --ranking_lambda "$RANKING_LAMBDA"
  --normalize_rewards "$NORMALIZE_REWARDS" --binarize_rewards "$BINARIZE_REWARDS"
)
convert_flags=(
  --embd_dir "$EMBD_REPO_DIR" --task "$TASK" --dataset "$DATASET" --sft_obj "$SFT_OBJ" --embed_model "$MODEL_NAME"
  --gen_model "$REPO_GEN_MODEL" --max_prompts "$MAX_PROMPTS" --output_dir "$DATA_DIR"
)

chosen_rm=()
[ -z "$REWARD_MODEL" ] || chosen_rm=(--reward_model "$REWARD_MODEL")
names=(--dataset "$DATASET" --eval_dataset "$EVAL_DATASET" --adapter_name "$ADAPTER_NAME")
generated=(
  "${names[@]}" --gen_pref_model_name "$GEN_PREF_MODEL" --task "$TASK" ${chosen_rm[@]+"${chosen_rm[@]}"}
  --gen_dir "$GEN_DIR"
)
sft_flags=(
  --model_name "$GEN_PREF_MODEL" --dataset "$DATASET" --data_dir "$SOURCE_DIR" --epochs "$SFT_EPOCHS"
  --learning_rate "$SFT_LEARNING_RATE" --batch_size "$SFT_BATCH_SIZE" --max_examples "$MAX_EXAMPLES" --seed "$SEED"
  --output_dir "$SFT_DIR"
)
sample_flags=(
  "${names[@]}" --model_name "$GEN_PREF_MODEL" --data_dir "$SOURCE_DIR" --sft_dir "$SFT_DIR" --max_len "$MAX_LEN"
  --temperature "$TEMPERATURE" --top_p "$TOP_P" --max_prompt_tokens "$MAX_PROMPT_TOKENS" --max_prompts "$MAX_PROMPTS"
  --backend "$BACKEND" --tensor_parallel "$TENSOR_PARALLEL" --gpu_memory_utilization "$GPU_MEMORY_UTILIZATION"
  --dtype "$DTYPE" --seed "$SEED" --output_dir "$GEN_DIR"
)
score_flags=("${generated[@]}" --max_length "$MAX_LENGTH" --batch_tokens "$BATCH_TOKENS" --dtype "$DTYPE")
embed_flags=(
  "${score_flags[@]}" --embed_model_name "$MODEL_NAME" --pooling "$POOLING" --output_dir "$DATA_DIR"
  --n_samples "$N_TRAIN_RESPONSES" --n_test_samples "$N_TEST_RESPONSES"
)

# Preflight: every setting is parsed before the first step starts.
"$PY" -c '
import sys, convert_embeddings
from rewardlib import artifacts
from rewardlib.cli import console, flags
def check():
    end = sys.argv.index("--")
    parser = console.parser(None)
    flags.add_run_flags(parser)
    flags.add_distillation_flags(parser)
    args = parser.parse_args(sys.argv[1:end])
    flags.distillation_settings(args)
    convert_embeddings.parse_args(sys.argv[end + 1:])
    artifacts.writable_dir(args.output_dir)
console.run(check, "run_all.sh")
' "${run_flags[@]}" "${distill_flags[@]}" -- "${convert_flags[@]}"
mkdir -p "$OUTPUT_DIR/logs"

if [ "$RUN_GPU_STEPS" = 1 ] && ((START_STEP <= 4)); then
  mkdir -p "$SFT_DIR" "$GEN_DIR" "$DATA_DIR"
  "$PY" -c '
import sys, step1_sft, step2_gen_sample, step3_reward_annotation, step4_gen_embeddings
from rewardlib.cli import console, preflight
def check():
    parts, rest = [], sys.argv[3:]
    while "--" in rest:
        parts.append(rest[: rest.index("--")])
        rest = rest[rest.index("--") + 1 :]
    step1_sft.parse_args(parts[0])
    sample = step2_gen_sample.parse_args([*parts[1], "--n_samples", sys.argv[1]])
    step2_gen_sample.parse_args([*parts[1], "--n_samples", sys.argv[2]])
    score = step3_reward_annotation.parse_args(parts[2])
    embed = step4_gen_embeddings.parse_args(parts[3])
    models = {"generator": sample.model_name, "reward": score.reward_model, "embedder": embed.embed_model_name}
    counts = {"train": int(sys.argv[1]), "test": int(sys.argv[2])}
    preflight.check(models, sample.dataset, sample.eval_dataset, sample.data_dir, sample.adapter_name, counts,
                    sample.max_prompts, sample.output_dir)
console.run(check, "run_all.sh")
' "$N_TRAIN_RESPONSES" "$N_TEST_RESPONSES" "${sft_flags[@]}" -- "${sample_flags[@]}" -- "${score_flags[@]}" -- \
    "${embed_flags[@]}" --
fi

lock_output

wanted() { (($1 >= START_STEP && $1 <= STOP_STEP)); }

if [ "$RUN_GPU_STEPS" = 1 ]; then
  if wanted 1 && [ "$ADAPTER_NAME" = sft ]; then stage step1 "$here/step1_sft.py" "${sft_flags[@]}"; fi
  for data_class in train test; do
    if [ "$data_class" = train ]; then n_responses=$N_TRAIN_RESPONSES; else n_responses=$N_TEST_RESPONSES; fi
    if wanted 2; then
      stage "step2-$data_class" "$here/step2_gen_sample.py" "${sample_flags[@]}" --data_class "$data_class" \
        --n_samples "$n_responses"
    fi
    if wanted 3; then
      stage "step3-$data_class" "$here/step3_reward_annotation.py" "${score_flags[@]}" --data_class "$data_class"
      stage "step3.5-$data_class" "$here/step3.5_processing_data.py" "${generated[@]}" --data_class "$data_class" \
        --n_samples "$n_responses"
    fi
  done
  if wanted 4; then stage step4 "$here/step4_gen_embeddings.py" "${embed_flags[@]}"; fi
elif [ -z "$PAIRS" ] && ((START_STEP <= 5)); then
  if [ "$USE_REPO_EMBD" = 1 ]; then
    stage convert "$here/convert_embeddings.py" "${convert_flags[@]}"
  elif ! compgen -G "$DATA_DIR/EMBD-TRAIN-split_*.npy" >/dev/null || [ -e "$DATA_DIR/.unfinished" ]; then
    [ "$DATA_DIR" = data ] ||
      refuse "DATA_DIR=$DATA_DIR: expected EMBD-TRAIN-split_0.npy and so on, found none; fill it with" \
        "convert_embeddings.py (or USE_REPO_EMBD=1), or with generate_demo_data.py --output_dir $DATA_DIR"
    echo "no embeddings in $DATA_DIR: making demo data, whose true reward is known"
    stage demo "$here/generate_demo_data.py" --output_dir "$DATA_DIR"
  fi
fi
if ((STOP_STEP >= 5)); then
  first=$((START_STEP > 5 ? START_STEP : 5)) status=0
  [ -z "$PAIRS" ] || run_flags+=(--pairs "$PAIRS")
  "$PY" -m rewardlib.cli.chain "$first" "$STOP_STEP" "${run_flags[@]}" -- "${distill_flags[@]}" || status=$?
  if ((status > 128 && status != 130)); then
    echo "run_all.sh: steps $first to $STOP_STEP were killed (status $status); the same command goes on from there" >&2
  fi
  exit "$status"
fi
