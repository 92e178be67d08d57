"""The flags that steps share, each with its one default, and the settings they make.

An environment variable of run_all.sh is the name of a flag in capitals; settings.py has the few
exceptions.
"""

import argparse
from collections.abc import Callable

import torch

from rewardlib.cli import kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts
from rewardlib.models.names import OBJECTIVES, check_names
from rewardlib.nets import mlp

GENERATOR = "gemma7b"
DATASET = "hh-rlhf-helpful-gpt4"
DATA_DIR = "data"
SFT_DIR = "sft_models"
GEN_DIR = "gen_data"
SEED = 6
MODEL_HELP = "gemma2b, gemma7b, llama38b, the id of a model on the hub, or a folder"


# ------------------------------------------------------------------------------------- steps 1 to 4


def add_generator_flag(
    group: argparse._ActionsContainer, name: str = "gen_pref_model_name"
) -> None:
    text = f"language model that generates the responses: {MODEL_HELP}"
    group.add_argument(f"--{name}", default=GENERATOR, help=text)


def add_dataset_flag(group: argparse._ActionsContainer) -> None:
    text = (
        "data that the generator is fine-tuned on: hh-rlhf-{helpful,harmless}[-gpt4], a "
        ".jsonl or a .csv file"
    )
    group.add_argument("--dataset", default=DATASET, help=text)


def add_prompt_flags(group: argparse._ActionsContainer) -> None:
    """What steps 2 to 4 answer, and with which adapter."""
    group.add_argument(
        "--adapter_name",
        default="sft",
        help="sft: the adapter that step 1 made on --dataset; none: no adapter; or a folder",
    )
    add_dataset_flag(group)
    group.add_argument(
        "--eval_dataset",
        help="source of the prompts; {data_class} in a file name stands for train or test; "
        "None: as --dataset, without -gpt4",
    )


def add_generated_flags(group: argparse._ActionsContainer) -> None:
    """The flags that name what steps 2 and 3 wrote; steps 3, 3.5 and 4 read it."""
    add_generator_flag(group)
    add_prompt_flags(group)
    add_task_flag(group)
    group.add_argument(
        "--reward_model",
        help="golden reward model: rmmistral7b, rayharmless, an id on the hub or a folder; "
        "None: the model of the task",
    )
    group.add_argument("--gen_dir", default=GEN_DIR, help="folder of the generated responses")


def add_task_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--task",
        type=kinds.word,
        default="helpful",
        help="what the golden reward rates: helpful, harmless or a word of your own",
    )


def add_embedder_flag(group: argparse._ActionsContainer, name: str = "embed_model_name") -> None:
    text = f"model that embeds prompt and response: {MODEL_HELP}"
    group.add_argument(f"--{name}", default="gemma2b", help=text)


def add_data_class_flag(group: argparse._ActionsContainer) -> None:
    choices = ("train", "test")
    group.add_argument("--data_class", choices=choices, default="train", help="prompts to work on")


def add_part_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--split",
        choices=("0", "1", "2", "3", "4", "all"),
        default="all",
        help="part of the work, a fifth each, for several processes; or all parts",
    )


def add_max_prompts_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--max_prompts",
        type=kinds.count_or_all,
        default="all",
        help="upper limit on the number of prompts of a split, the first ones; or all",
    )


def add_language_model_flags(group: argparse._ActionsContainer) -> None:
    """How steps 2 to 4 run a language model."""
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights; auto: bfloat16 on a GPU, float32 elsewhere",
    )
    add_trust_flag(group)


def add_trust_flag(group: argparse._ActionsContainer) -> None:
    text = "run code that comes with the model"
    group.add_argument("--trust_remote_code", action="store_true", help=text)


def add_batch_flags(group: argparse._ActionsContainer) -> None:
    """How many tokens steps 3 and 4 take at a time."""
    group.add_argument(
        "--max_length",
        type=kinds.count,
        default=1024,
        help="upper limit on the number of tokens of prompt and response",
    )
    group.add_argument(
        "--batch_tokens",
        type=kinds.count,
        default=16384,
        help="number of tokens of a batch, padding included",
    )


def add_seed_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument("--seed", type=kinds.seed, default=SEED, help="random seed")


def name_sources(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the prompts and the reward model that follow from the data set and the task."""
    args.eval_dataset = args.eval_dataset or prompts.default_prompts(args.dataset)
    args.reward_model = args.reward_model or loading.REWARD_MODELS.get(args.task)
    if args.reward_model is None:
        raise InputError(
            f"task {args.task}: expected --reward_model beside it (helpful and harmless have "
            "one), found none"
        )
    return args


# ------------------------------------------------------------------------------------- steps 5 to 8


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a run of reward models; steps 5 to 8 take the same ones."""
    add_naming_flags(parser)
    group = parser.add_argument_group("run")
    add_seed_flag(group)
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="type of the matrix products of MLPs, whose weights stay float32; "
        "auto: bf16 where the CPU computes in it (AMX, AVX-512 BF16), else fp32",
    )
    group.add_argument(
        "--num_threads",
        type=kinds.count,
        help="number of threads of torch; None: OMP_NUM_THREADS, else the number of cores",
    )
    group.add_argument(
        "--data_dir",
        default=DATA_DIR,
        help="folder of the embeddings EMBD-TRAIN-split_{k}.npy and their rewards",
    )
    group.add_argument(
        "--output_dir", default="distill_out", help="folder of the results of one experiment"
    )


def add_naming_flags(parser: argparse.ArgumentParser) -> None:
    """The flags whose values are the settings of a run, with the seed."""
    add_data_flags(parser)
    add_label_flags(parser)
    add_model_flags(parser)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("names of the data, which label the results")
    add_task_flag(group)
    add_embedder_flag(group)
    group.add_argument(
        "--sft_obj",
        default="gpt4",
        help="name of the data that the generator was fine-tuned on, a label of the results",
    )
    add_generator_flag(group)


def add_label_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preference labels")
    group.add_argument(
        "--pairing",
        choices=["xprompt", "sameprompt"],
        default="xprompt",
        help="compare responses to different prompts, or to the same prompt",
    )
    group.add_argument(
        "--consider_first_n",
        type=int,
        choices=[2, -1, -2],
        default=2,
        help="responses of a prompt that are compared: any two (2), those of the lowest and the "
        "highest reward (-1), the middle two by reward (-2)",
    )
    group.add_argument(
        "--n_sample",
        type=kinds.count_or_all,
        default=100,
        help="number of prompts to label, student-train prompts first; or all that may be "
        "fitted on",
    )
    group.add_argument(
        "--n_pairs", type=kinds.count, default=1, help="number of labelled pairs per prompt"
    )
    group.add_argument(
        "--annotation_quality",
        type=kinds.finite,
        default=10.0,
        help="P(i preferred to j) = sigmoid(quality * (r_i - r_j) / reward_scale); "
        "below 0: labels without errors",
    )
    group.add_argument(
        "--reward_scale",
        type=kinds.positive,
        help="scale of reward differences; None: standard deviation of the golden rewards",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reward models")
    group.add_argument(
        "--rm_model",
        choices=list(OBJECTIVES),
        default="mlp",
        help="kind of reward model: MLP, linear, LightGBM, linear with a Laplace posterior, "
        "ridge regression on golden rewards (a reference)",
    )
    group.add_argument(
        "--rm_objective",
        choices=["bt", "clf", "regression"],
        default="bt",
        help="Bradley-Terry (mlp, linear, laplace), classification (mlp, linear, lgbm), "
        "regression (ridge)",
    )
    group.add_argument(
        "--ensemble_number", type=kinds.count, default=10, help="number of ensemble members"
    )
    group.add_argument(
        "--training_epochs",
        type=kinds.count,
        default=2,
        help="upper limit on passes through the pairs; the epoch of the best validation "
        "accuracy is kept (mlp)",
    )
    group.add_argument(
        "--learning_rate",
        type=kinds.positive,
        default=0.001,
        help="peak learning rate, after warm-up over a tenth of the steps and before cosine "
        "decay to zero (mlp)",
    )
    group.add_argument(
        "--batch_size",
        type=kinds.count,
        help="pairs per optimiser step; None: a sixteenth of the training pairs, between 16 "
        "and 1024 (mlp)",
    )
    group.add_argument(
        "--hidden",
        type=kinds.count,
        nargs=2,
        default=list(mlp.HIDDEN),
        metavar=("FIRST", "SECOND"),
        help="units of the two hidden layers of MLPs; 256 64 with learning rate 0.002 is "
        "several times cheaper",
    )
    group.add_argument(
        "--replacement",
        type=kinds.switch,
        help="1: train each member on a bootstrap of the prompts; None: 1 for models whose fit "
        "draws nothing at random, 0 for mlp",
    )


def add_pairs_flag(parser: argparse.ArgumentParser) -> None:
    """--pairs: steps 5 and 6 on recorded preferences."""
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        help="file of recorded preferences (.npz, .safetensors or .parquet) to train and evaluate "
        "on, in place of --data_dir and of simulated labels",
    )


def add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of step 7, which step 8 repeats to name what it validates."""
    group = parser.add_argument_group("calibration and distillation")
    group.add_argument(
        "--teacher_ckpt",
        nargs="+",
        help="paths or globs of checkpoints whose mean is the teacher; None: the members of step 5",
    )
    group.add_argument(
        "--distill_epochs",
        type=kinds.count,
        default=20,
        help="upper limit on passes of the student through its prompts",
    )
    group.add_argument(
        "--distill_learning_rate",
        type=kinds.positive,
        default=5e-4,
        help="peak learning rate of the student",
    )
    group.add_argument(
        "--distill_batch_size",
        type=kinds.count,
        default=32,
        help="prompts per optimiser step of the student, each with all its responses",
    )
    group.add_argument(
        "--distill_steps",
        type=kinds.count,
        default=250,
        help="approximate upper limit on optimiser steps, but at least one pass; lowers "
        "--distill_epochs",
    )
    group.add_argument(
        "--distill_responses",
        type=kinds.at_least(20),
        default=12_000,
        help="upper limit on the number of responses to calibrate on and to distil, spread over "
        "the prompts",
    )
    group.add_argument(
        "--cv_folds",
        type=kinds.at_least(2),
        default=5,
        help="number of folds, by prompt, for the calibrated targets of the student",
    )
    group.add_argument(
        "--student_loss",
        choices=["mse", "hybrid"],
        default="hybrid",
        help="mean squared error, or hybrid: plus a ranking term within prompts",
    )
    group.add_argument(
        "--ranking_lambda",
        type=kinds.non_negative,
        default=1.0,
        help="weight of the ranking term of the hybrid loss",
    )
    group.add_argument(
        "--isotonic",
        choices=["centred", "plain"],
        default="centred",
        help="centred isotonic regression, which keeps the ranking, or plain, which makes ties",
    )
    group.add_argument(
        "--normalize_rewards",
        type=kinds.switch,
        default=False,
        help="1: calibrate to golden rewards of mean 0 and standard deviation 1",
    )
    group.add_argument(
        "--binarize_rewards",
        type=kinds.switch,
        default=False,
        help="1: calibrate to the probability that the golden reward exceeds the threshold",
    )
    group.add_argument(
        "--binarize_threshold",
        type=kinds.finite,
        default=0.0,
        help="golden reward above which --binarize_rewards counts a response as good",
    )


# ----------------------------------------------------------------------------------------- settings


def names_of(add_flags: Callable) -> list[str]:
    """Names of the flags that `add_flags` adds to a parser, in that order."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    return [action.dest for action in parser._actions]


MLP_FLAGS = ("training_epochs", "learning_rate", "batch_size", "hidden")


def run_settings(args: argparse.Namespace) -> dict:
    """What names a run of reward models: the flags that change its result, resolved to values.

    Settings that the kind of model does not use are left out. "precision" is the type that this
    CPU computes in.
    """
    check_names(args.rm_model, args.rm_objective)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    settings = {name: getattr(args, name) for name in [*names_of(add_naming_flags), "seed"]}
    if args.replacement is None:
        settings["replacement"] = args.rm_model != "mlp"
    if args.rm_model != "mlp":
        return {name: value for name, value in settings.items() if name not in MLP_FLAGS}
    return settings | {"precision": computing_name(args)}


def student_settings(args: argparse.Namespace, starts_from_mlp: bool) -> dict:
    """What a student adds to the settings of a run whose reward models are no MLPs.

    A student that starts from an MLP has the hidden layers of that MLP.
    """
    if args.rm_model == "mlp":
        return {}
    hidden = {} if starts_from_mlp else {"hidden": args.hidden}
    return hidden | {"precision": computing_name(args)}


def computing_name(args: argparse.Namespace) -> str:
    """ "fp32" or "bf16": what MLPs compute in on this CPU."""
    return mlp.choose_precision(args.precision)


def computing_type(args: argparse.Namespace) -> torch.dtype:
    return mlp.TYPES[computing_name(args)]


def distillation_settings(args: argparse.Namespace) -> dict:
    """The flags that change what step 7 makes of a teacher, as values."""
    if args.normalize_rewards and args.binarize_rewards:
        raise InputError(
            "normalize_rewards and binarize_rewards: expected at most one of them to be 1, "
            "found both"
        )
    names = [name for name in names_of(add_distillation_flags) if name != "teacher_ckpt"]
    return {name: getattr(args, name) for name in names}
