"""The flags that steps share, and the settings they make."""

from rewardlib.cli import kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts
from rewardlib.models import registry
from rewardlib.models.classifiers import has_lightgbm
from rewardlib.nets import mlp


def add_run_flags(made):
    """The flags that name a run of reward models; steps 5 to 8 take the same ones with the same defaults."""
    named = made.add_argument_group(
        "the data (names only; they are recorded and label the results)"
    )
    named.add_argument(
        "--task",
        type=kinds.word,
        default="helpful",
        help="what the golden reward rates: helpful, harmless or your own word",
    )
    named.add_argument(
        "--embed_model_name", default="gemma2b", help="model that embedded the responses"
    )
    named.add_argument("--sft_obj", default="gpt4", help="what the generating model was tuned on")
    named.add_argument(
        "--gen_pref_model_name", default="gemma7b", help="model that generated the responses"
    )
    labels = made.add_argument_group("preference labels")
    labels.add_argument(
        "--pairing",
        choices=["xprompt", "sameprompt"],
        default="xprompt",
        help="pairs across or within prompts",
    )
    labels.add_argument(
        "--consider_first_n",
        type=int,
        choices=[2, -1, -2],
        default=2,
        help="2: any two of the K responses; -1: from the lowest and the highest; -2: from the middle two",
    )
    labels.add_argument(
        "--n_sample",
        type=kinds.count_or_all,
        default=100,
        help="prompts to label, or all that may be fitted on",
    )
    labels.add_argument("--n_pairs", type=kinds.count, default=1, help="pairs per prompt")
    labels.add_argument(
        "--annotation_quality",
        type=kinds.finite,
        default=10.0,
        help="P(i preferred to j) = sigmoid(quality * (r_i - r_j) / reward_scale); below 0: perfect labels",
    )
    labels.add_argument(
        "--reward_scale",
        type=kinds.positive,
        default=None,
        help="None: standard deviation of the golden rewards",
    )
    training = made.add_argument_group("reward models")
    training.add_argument(
        "--rm_model",
        choices=["mlp", "linear", "lgbm", "laplace", "ridge"],
        default="mlp",
        help="kind of reward model; --training_epochs to --precision are those of MLPs, students included",
    )
    training.add_argument(
        "--rm_objective",
        choices=["bt", "clf", "regression"],
        default="bt",
        help="Bradley-Terry (mlp, linear, laplace), classification (mlp, linear, lgbm), golden rewards (ridge)",
    )
    training.add_argument("--ensemble_number", type=kinds.count, default=10, help="members")
    training.add_argument(
        "--training_epochs", type=kinds.count, default=2, help="most passes through the pairs"
    )
    training.add_argument(
        "--learning_rate", type=kinds.positive, default=0.001, help="peak of the schedule"
    )
    training.add_argument(
        "--batch_size",
        type=kinds.count,
        default=None,
        help="pairs per step; None: a sixteenth of the training pairs, between 16 and 1024",
    )
    training.add_argument(
        "--hidden",
        type=kinds.count,
        nargs=2,
        default=[1024, 512],
        metavar=("FIRST", "SECOND"),
        help="units of the two hidden layers",
    )
    training.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of matrix products; auto: bf16 on CPUs that have it (AMX, AVX-512 BF16), else fp32",
    )
    training.add_argument(
        "--replacement",
        type=kinds.switch,
        default=None,
        help="1: each member on a bootstrap of the prompts; None: 1 for models whose fit draws nothing, 0 for mlp",
    )
    run_group = made.add_argument_group("run")
    run_group.add_argument("--seed", type=kinds.seed, default=6, help="of every random draw")
    run_group.add_argument(
        "--num_threads",
        type=kinds.count,
        default=None,
        help="None: OMP_NUM_THREADS, else every core",
    )
    run_group.add_argument(
        "--data_dir", default="data", help="EMBD-TRAIN-split_{k}.npy and rewards"
    )
    run_group.add_argument(
        "--output_dir", default="distill_out", help="results; one experiment a folder"
    )


RUN_FLAGS = (
    "task", "embed_model_name", "sft_obj", "gen_pref_model_name", "pairing", "consider_first_n", "n_sample", "n_pairs",
    "annotation_quality", "reward_scale", "rm_model", "rm_objective", "ensemble_number", "training_epochs",
    "learning_rate", "batch_size", "hidden", "replacement", "seed",
)  # fmt: skip


def run_settings(args):
    """The values of the flags that name a run, as a dict; "precision" is the one that this CPU runs."""
    import torch  # a second that --help and a preflight do without

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    check_model(args)
    settings = {name: getattr(args, name) for name in RUN_FLAGS}
    if args.replacement is None:
        settings["replacement"] = args.rm_model != "mlp"
    return settings | {"precision": mlp.choose_precision(args.precision)}


def check_model(args):
    """InputError unless --rm_model has --rm_objective and what it needs is installed."""
    if args.rm_model == "mlp" and args.rm_objective != "regression":
        return

    registry.model_class(args.rm_model, args.rm_objective)
    if args.rm_model == "lgbm" and not has_lightgbm():
        raise InputError("rm_model lgbm: expected LightGBM, found none; pip install lightgbm")


def add_pairs_flag(made):
    """--pairs: steps 5 and 6 on recorded preferences."""
    made.add_argument(
        "--pairs",
        metavar="FILE",
        help="preferences that people recorded (.npz, .safetensors or .parquet) in place of --data_dir; the flags of "
        "the data and of preference labels then mean nothing",
    )


def add_generated_flags(made):
    """The flags that name what steps 2 and 3 made; steps 3, 3.5 and 4 take the same ones with the same defaults."""
    made.add_argument(
        "--gen_pref_model_name", default="gemma7b", help="model that generated the responses"
    )
    made.add_argument("--adapter_name", default="sft", help="as in step 2")
    made.add_argument(
        "--dataset", default="hh-rlhf-helpful-gpt4", help="what the generator was fine-tuned on"
    )
    made.add_argument(
        "--eval_dataset", help="where the prompts come from; None: as --dataset, without -gpt4"
    )
    made.add_argument(
        "--task", default="helpful", help="chooses the reward model: helpful or harmless"
    )
    made.add_argument(
        "--reward_model", help="rmmistral7b, rayharmless, a hub id or a folder; None: by --task"
    )


def name_sources(args):
    """Fill in the prompts and the reward model that follow from --dataset and --task where they were not given."""
    args.eval_dataset = args.eval_dataset or prompts.default_prompts(args.dataset)
    args.reward_model = args.reward_model or loading.REWARD_MODELS.get(args.task)
    if args.reward_model is None:
        raise InputError(
            f"task {args.task}: expected --reward_model beside it (helpful and harmless have one), found none"
        )
    return args


def add_distillation_flags(made):
    """The flags of step 7, which step 8 repeats to name what it validates."""
    group = made.add_argument_group("calibration and distillation")
    group.add_argument(
        "--teacher_ckpt",
        nargs="+",
        help="paths or globs; their mean is the teacher; default: step 5's members",
    )
    group.add_argument(
        "--distill_epochs", type=kinds.count, default=20, help="most passes of the student"
    )
    group.add_argument(
        "--distill_learning_rate",
        type=kinds.positive,
        default=5e-4,
        help="peak of the student's schedule",
    )
    group.add_argument(
        "--distill_batch_size",
        type=kinds.count,
        default=32,
        help="prompts per step, with all their responses",
    )
    group.add_argument(
        "--distill_steps",
        type=kinds.count,
        default=250,
        help="no more passes than make about so many steps",
    )
    group.add_argument(
        "--distill_responses",
        type=kinds.at_least(20),
        default=12_000,
        help="most responses to calibrate on and learn from, spread over the prompts",
    )
    group.add_argument(
        "--cv_folds",
        type=kinds.at_least(2),
        default=5,
        help="folds, by prompt, of the student's calibrated targets",
    )
    group.add_argument(
        "--student_loss",
        choices=["mse", "hybrid"],
        default="hybrid",
        help="hybrid adds a ranking term",
    )
    group.add_argument(
        "--ranking_lambda", type=kinds.non_negative, default=1.0, help="weight of the ranking term"
    )
    group.add_argument(
        "--isotonic", choices=["centred", "plain"], default="centred", help="plain makes ties"
    )
    group.add_argument(
        "--normalize_rewards",
        type=kinds.switch,
        default=False,
        help="1: calibrate to standardised rewards",
    )
    group.add_argument(
        "--binarize_rewards",
        type=kinds.switch,
        default=False,
        help="1: calibrate to P(reward > threshold)",
    )
    group.add_argument(
        "--binarize_threshold", type=kinds.finite, default=0.0, help="of the golden reward"
    )


DISTILLATION_FLAGS = (
    "distill_epochs", "distill_learning_rate", "distill_batch_size", "distill_steps", "distill_responses", "cv_folds",
    "student_loss", "ranking_lambda", "isotonic", "normalize_rewards", "binarize_rewards", "binarize_threshold",
)  # fmt: skip


def distillation_settings(args):
    """The values of the flags that change what step 7 makes, as a dict."""
    if args.normalize_rewards and args.binarize_rewards:
        raise InputError(
            "normalize_rewards and binarize_rewards: expected at most one of them to be 1, found both"
        )
    return {name: getattr(args, name) for name in DISTILLATION_FLAGS}
