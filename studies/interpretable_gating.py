"""Stage 2 of the interpretable reward: a gate that weights attributes by prompt, and its baselines.

The weights of the gate, a softmax over attributes, multiply the debiased attribute rewards of both
responses of a pair; the gate learns from preferences (Bradley-Terry). Prompts are split into fit,
validation (best epoch, ridge strengths) and held-out. The baselines are fitted on the same pairs:
uniform weights, the best single attribute, one weighting for all prompts, and a linear head on the
embeddings. Prompts that the attribute heads were fitted on are not held out where the files tell.

Reads   --pairs: prepared pairs with prompt_embeddings; MODEL_DIR of interpretable_regression.py
Writes  OUTPUT_DIR/gate.safetensors    gate, standardisation of the attributes, baselines
        OUTPUT_DIR/gate.json           accuracies with intervals, weights, every epoch
        OUTPUT_DIR/gating_split.json   prompts of the three parts, and of the attribute heads where
                                       the files tell
Example python studies/interpretable_gating.py --pairs prepared/pairs.safetensors \\
            --model_dir interpretable_out
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts, seeds
from rewardlib.cli import console, kinds, tables
from rewardlib.nets.gate import GATE_HIDDEN, train_gate
from rewardlib.nets.training import Training, default_batch_size
from studies.interpretable import attribute_data, flag_values, gating, multi_objective

READ_FROM_MODEL_DIR = (multi_objective.HEADS, gating.HEADS_RECORD, gating.HEADS_SPLIT)
PATHS = ("pairs", "model_dir", "output_dir", "debug")


def make_parser():
    """The parser of all flags."""
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs and outputs")
    group.add_argument(
        "--pairs",
        required=True,
        help="prepared file of pairs, chosen then rejected, or a quoted pattern of its shards",
    )
    group.add_argument(
        "--model_dir", default="interpretable_out", help="folder with the attribute heads"
    )
    group.add_argument("--output_dir", help="folder for the results; None: --model_dir")
    group = parser.add_argument_group("attributes")
    group.add_argument(
        "--drop", nargs="+", default=[], metavar="NAME", help="attributes that the gate leaves out"
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        type=flag_values.named_weight,
        default=[],
        metavar="NAME=WEIGHT",
        help="attributes with a fixed weight in place of a learned one",
    )
    add_gate_flags(parser)
    group = parser.add_argument_group("split")
    group.add_argument(
        "--validation_share",
        type=flag_values.probability,
        default=0.1,
        help="share of the pairs on validation prompts",
    )
    group.add_argument(
        "--held_out_share",
        type=flag_values.probability,
        default=0.2,
        help="share of the pairs on held-out prompts",
    )
    group.add_argument("--seed", type=kinds.seed, default=6, help="random seed")
    return parser


def add_gate_flags(parser):
    group = parser.add_argument_group("gate")
    group.add_argument(
        "--temperature",
        type=kinds.positive,
        default=10.0,
        help="temperature of the softmax over attributes",
    )
    group.add_argument(
        "--dropout",
        type=flag_values.probability,
        default=0.2,
        help="dropout rate after each hidden layer",
    )
    group.add_argument(
        "--hidden",
        type=kinds.count,
        nargs="+",
        default=list(GATE_HIDDEN),
        help="sizes of the hidden layers",
    )
    group.add_argument(
        "--epochs",
        type=kinds.count,
        default=20,
        help="largest number of epochs; the one with the lowest validation loss is kept",
    )
    group.add_argument(
        "--learning_rate", type=kinds.positive, default=1e-3, help="peak learning rate"
    )
    group.add_argument(
        "--weight_decay", type=kinds.non_negative, default=0.0, help="weight decay of AdamW"
    )
    group.add_argument(
        "--batch_size",
        type=kinds.count,
        help="number of pairs in a batch; None: a sixteenth of the fit pairs, from 16 to 1024",
    )


def parse_args(argv=None):
    """The parsed flags."""
    return make_parser().parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    output_dir = artifacts.writable_dir(args.output_dir or args.model_dir)
    data = attribute_data.read(args.pairs, pairs=True)
    gating.check_prompts(data)
    model = multi_objective.load(args.model_dir, data)
    attributes, frozen = gating.choose_attributes(model.attributes, args.drop, dict(args.freeze))
    seen = gating.prompts_of_heads(args.model_dir, data)
    settings = {name: value for name, value in vars(args).items() if name not in PATHS}
    model_dir = Path(args.model_dir)
    inputs = {name: artifacts.sha256(model_dir / name) for name in READ_FROM_MODEL_DIR}
    with (
        artifacts.lock(output_dir),
        artifacts.work(
            output_dir, "gating", __file__, settings, {**data.digests, **inputs}
        ) as work,
    ):
        if work is None:
            report(artifacts.read_json(output_dir / gating.RECORD, gating.MADE_BY))
            return
        split = gating.split_prompts(
            data.groups, seen, args.held_out_share, args.validation_share, args.seed
        )
        gated, log = fit(args, data, model, attributes, frozen, split)

        if model_dir.resolve() != output_dir.resolve():
            copy_heads(model_dir, output_dir)
            work.outputs.append(multi_objective.HEADS)
        gating.save(output_dir, gated)
        work.outputs.append(gating.GATE)
        prompts = {part: np.unique(data.groups[rows]) for part, rows in split.items()}
        work.write_json(gating.SPLIT, {**prompts, "heads": seen})
        work.write_json(gating.RECORD, describe(args, gated, data, split, seen, log, settings))
    report(artifacts.read_json(output_dir / gating.RECORD, gating.MADE_BY))
    print(f"gating: wrote {', '.join(work.outputs)} to {output_dir}; next: studies/rewardbench.py")


# ------------------------------------------------------------------------------------------ fitting


def fit(args, data, model, attributes, frozen, split):
    """(GatedModel with gate and baselines, log of the training).

    attributes, frozen: as gating.choose_attributes returns them; split: {part: row numbers}.
    """
    fit_rows, validation_rows = split["fit"], split["validation"]
    rows = np.arange(len(data.groups))
    raw = multi_objective.score_rows(model, data, rows)
    gated = gating.standardise(model, attributes, raw[fit_rows])
    values = gating.standardised(gated, raw)
    gate, log = train_gate(
        data.take_prompts(rows),
        values,
        (fit_rows, validation_rows),
        frozen,
        Training(
            args.epochs,
            args.learning_rate,
            args.batch_size or default_batch_size(len(fit_rows)),
            weight_decay=args.weight_decay,
        ),
        seeds.torch_seed(args.seed, "gate"),
        hidden=args.hidden,
        dropout=args.dropout,
        temperature=args.temperature,
    )
    known_values = values[np.concatenate([fit_rows, validation_rows])]
    gated = replace(
        gated,
        gate=gate,
        single=gating.best_attribute(attributes, known_values),
        global_weights=gating.fit_global_weights(values, fit_rows, validation_rows),
        linear_head=gating.fit_linear_head(data, fit_rows, validation_rows),
    )
    return gated, log


def copy_heads(model_dir, output_dir):
    """Copy the attribute heads, without which the gate cannot be loaded, to another folder."""
    with artifacts.atomic(output_dir / multi_objective.HEADS) as file:
        file.write((Path(model_dir) / multi_objective.HEADS).read_bytes())


# ------------------------------------------------------------------------------------------- record


def describe(args, gated, data, split, seen, log, settings):
    """What gate.json holds."""
    comparisons = {}
    for part in ("validation", "held_out"):
        rows = split[part]
        scores = gating.rewards(gated, data, rows)
        comparisons[part] = gating.compare(scores, data.groups[rows], args.seed)
    null_reason = None
    if not comparisons["held_out"]:
        null_reason = gating.describe_no_held_out(seen, args.held_out_share)

    def by_name(values):
        return dict(zip(gated.attributes, values.tolist(), strict=True))

    return {
        "settings": settings,
        "pairs": {"path": str(args.pairs), "source": data.source, "left_out": len(data.left_out)},
        "attributes": gated.attributes,
        "verbosity": gated.model.verbosity,
        "frozen": {
            name: weight
            for name, weight in by_name(gated.gate.frozen.numpy()).items()
            if np.isfinite(weight)
        },
        "temperature": gated.gate.temperature,
        "scale": float(gated.gate.log_scale.detach().exp()),
        "centre": by_name(gated.centre),
        "spread": by_name(gated.spread),
        "n_pairs": {part: len(rows) for part, rows in split.items()},
        "n_prompts": {part: len(np.unique(data.groups[rows])) for part, rows in split.items()},
        "prompts_of_heads": gating.describe_seen(seen, data.groups, split),
        **comparisons,
        "null_reason": null_reason,
        "weights": describe_weights(gated, data, split),
        "baselines": {
            "best_single": gated.single,
            "global_weights": by_name(gated.global_weights),
        },
        "best_epoch": max(epoch["epoch"] for epoch in log if epoch["best"]),
        "log": log,
    }


def describe_weights(gated, data, split):
    """Statistics of the weights on held-out prompts, or on validation prompts if none is held out.

    Each prompt counts once, however many pairs it has.
    """
    part = "held_out" if len(split["held_out"]) else "validation"
    rows = split[part]
    rows = rows[np.unique(data.groups[rows], return_index=True)[1]]
    weights = gating.weights(gated, data, rows)
    return {"of": part, **gating.describe_weights(gated.attributes, weights)}


# ------------------------------------------------------------------------------------------- report


def report(record):
    """Print what was fitted, held-out accuracies and the weights of a record."""
    counts = record["n_pairs"]
    print(
        f"gating: {counts['fit']} fit pairs, {counts['validation']} validation pairs, "
        f"{counts['held_out']} held-out pairs"
    )
    print(f"gating: {record['prompts_of_heads']['told']}")
    print(
        f"gating: epoch {record['best_epoch']} of {len(record['log'])} is the best; "
        f"scale {record['scale']:.3g}"
    )
    if record["held_out"]:
        report_accuracies(record["held_out"], record["baselines"]["best_single"])
    else:
        print(f"gating: no held-out accuracy: {record['null_reason']}")
    report_weights(record["weights"], record["frozen"])


def report_accuracies(held_out, best_single):
    title = f"{'held-out accuracy':36}{'[95 % interval]':>24}{'gate minus method':>28}"
    print(f"{title}  ({held_out['n_prompts']} prompts)")
    for method, row in held_out["methods"].items():
        name = f"{method} ({best_single})" if method == "best_single" else method
        gap = difference(held_out["gate_minus"].get(method))
        print(f"  {name:34}{tables.with_interval(row, 'accuracy'):>24}{gap:>28}")


def report_weights(weights, frozen_weights):
    title = f"{'weights':36}{'mean':>8}{'sd between prompts':>20}"
    print(f"{title}  ({weights['n_prompts']} prompts, {weights['of']})")
    for name, mean in weights["mean"].items():
        frozen = "  frozen" if name in frozen_weights else ""
        print(f"  {name:34}{mean:>8.3f}{weights['sd_between_prompts'][name]:>20.3f}{frozen}")
    print(
        f"  entropy, 1 for equal weights: {weights['relative_entropy']:.3f} of the weights of a "
        f"prompt, {weights['entropy_of_mean']:.3f} of the mean weights"
    )


def difference(gap):
    """ "+0.012 [-0.003, +0.027]" of a paired difference, "" where there is none."""
    if gap is None:
        return ""
    return f"{gap['difference']:+.3f} [{gap['ci95'][0]:+.3f}, {gap['ci95'][1]:+.3f}]"


if __name__ == "__main__":
    console.run(main, "gating")
