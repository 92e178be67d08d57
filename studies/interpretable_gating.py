"""Stage 2 of the interpretable reward: a gate that tells from the prompt which attributes matter, and its baselines.

The gate's weights, a softmax over attributes, multiply the debiased attribute rewards of both
responses of a pair; it learns from preferences (Bradley-Terry). Prompts are split into fit,
validation (best epoch, ridge strengths) and held out. Uniform weights, the best single attribute,
one set of weights for all prompts and a linear head on the embeddings are fitted on the same pairs.
Prompts that the attribute heads were fitted on are not held out where that can be told.

Reads   --pairs: prepared pairs with prompt_embeddings; MODEL_DIR as interpretable_regression.py leaves it
Writes  OUTPUT_DIR/gate.safetensors    gate, standardisation of the attributes, baselines
        OUTPUT_DIR/gate.json           accuracies with intervals, weights, every epoch
        OUTPUT_DIR/gating_split.json   prompts of the three parts, and of the attribute heads where they can be told
Example python studies/interpretable_gating.py --pairs prepared/pairs.safetensors --model_dir interpretable_out
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts, seeds
from rewardlib.cli import console, kinds, tables
from rewardlib.errors import InputError
from rewardlib.nets.gate import GATE_HIDDEN, train_gate
from rewardlib.nets.training import Training, default_batch_size
from studies.interpretable import attribute_data, gating, multi_objective

OUTPUTS = (gating.GATE, gating.RECORD, gating.SPLIT)
READ_FROM_MODEL_DIR = (multi_objective.HEADS, gating.HEADS_RECORD, gating.HEADS_SPLIT)


def parse_args(argv=None):
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs and outputs")
    group.add_argument(
        "--pairs", required=True, help="prepared pairs, chosen then rejected; a file or shards"
    )
    group.add_argument(
        "--model_dir", default="interpretable_out", help="where the attribute heads are"
    )
    group.add_argument("--output_dir", help="results; None: --model_dir")
    group = parser.add_argument_group("attributes")
    group.add_argument(
        "--drop", nargs="+", default=[], metavar="NAME", help="attributes to leave out"
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        type=named_weight,
        default=[],
        metavar="NAME=WEIGHT",
        help="weights to give, not learn",
    )
    group = parser.add_argument_group("gate")
    group.add_argument(
        "--temperature", type=kinds.positive, default=10.0, help="divides the logits of the weights"
    )
    group.add_argument("--dropout", type=probability, default=0.2, help="after each hidden layer")
    group.add_argument(
        "--hidden", type=kinds.count, nargs="+", default=list(GATE_HIDDEN), help="layer sizes"
    )
    group.add_argument(
        "--epochs",
        type=kinds.count,
        default=20,
        help="most passes; the best by validation loss is kept",
    )
    group.add_argument(
        "--learning_rate", type=kinds.positive, default=1e-3, help="peak of the schedule"
    )
    group.add_argument("--weight_decay", type=kinds.non_negative, default=0.0, help="of AdamW")
    group.add_argument(
        "--batch_size",
        type=kinds.count,
        help="pairs; None: a sixteenth of those to fit, between 16 and 1024",
    )
    group = parser.add_argument_group("split")
    group.add_argument(
        "--validation_share", type=probability, default=0.1, help="of the pairs, by prompt"
    )
    group.add_argument(
        "--held_out_share", type=probability, default=0.2, help="of the pairs, by prompt"
    )
    group.add_argument("--seed", type=kinds.seed, default=6, help="of every random draw")
    return parser.parse_args(argv)


def named_weight(text):
    name, found, weight = text.rpartition("=")
    if not found or not name:
        raise InputError(f"--freeze: expected NAME=WEIGHT, found {text!r}")
    return name, kinds.finite(weight)


def probability(text):
    value = kinds.non_negative(text)
    if value >= 1:
        raise InputError(f"expected a share of at least 0 and below 1, found {text}")
    return value


def main(argv=None):
    args = parse_args(argv)
    output_dir = artifacts.writable_dir(args.output_dir or args.model_dir)
    data = attribute_data.read(args.pairs, pairs=True)
    gating.check_prompts(data)
    model = multi_objective.load(args.model_dir, data)
    attributes, frozen = gating.choose_attributes(model.attributes, args.drop, dict(args.freeze))
    seen = gating.prompts_of_heads(args.model_dir, data)
    settings = {
        k: v
        for k, v in vars(args).items()
        if k not in ("pairs", "model_dir", "output_dir", "debug")
    }
    with artifacts.lock(output_dir):
        inputs = {
            name: artifacts.sha256(Path(args.model_dir) / name) for name in READ_FROM_MODEL_DIR
        }
        work = artifacts.identity(__file__, settings, {**data.digests, **inputs})
        if artifacts.is_finished(output_dir, "gating", work):
            report(artifacts.read_json(output_dir / gating.RECORD, gating.MADE_BY))
            print(f"gating: already done in {output_dir} (FORCE=1 redoes it)")
            return
        started = time.time()
        split = gating.split_prompts(
            data.groups, seen, args.held_out_share, args.validation_share, args.seed
        )
        fit, validation = split["fit"], split["validation"]

        rows = np.arange(len(data.groups))
        raw = multi_objective.score_rows(model, data, rows)
        gated = gating.standardise(model, attributes, raw[fit])
        values = gating.standardised(gated, raw)
        gate, log = train_gate(
            data.take_prompts(rows),
            values,
            (fit, validation),
            frozen,
            Training(
                args.epochs,
                args.learning_rate,
                args.batch_size or default_batch_size(len(fit)),
                weight_decay=args.weight_decay,
            ),
            seeds.torch_seed(args.seed, "gate"),
            hidden=args.hidden,
            dropout=args.dropout,
            temperature=args.temperature,
        )
        gated = replace(
            gated,
            gate=gate,
            single=gating.best_attribute(attributes, values[np.concatenate([fit, validation])]),
            global_weights=gating.fit_global_weights(values, fit, validation),
            linear_head=gating.fit_linear_head(data, fit, validation),
        )

        outputs = list(OUTPUTS)
        if Path(args.model_dir).resolve() != output_dir.resolve():
            outputs.append(multi_objective.HEADS)
            with artifacts.atomic(output_dir / multi_objective.HEADS) as file:
                file.write((Path(args.model_dir) / multi_objective.HEADS).read_bytes())
        gating.save(output_dir, gated)
        prompts = {name: np.unique(data.groups[part]) for name, part in split.items()} | {
            "heads": seen
        }
        artifacts.write_json(output_dir / gating.SPLIT, prompts)
        artifacts.write_json(
            output_dir / gating.RECORD, describe(args, gated, data, split, seen, log, settings)
        )
        artifacts.record(output_dir, "gating", work, outputs, started)
        report(artifacts.read_json(output_dir / gating.RECORD, gating.MADE_BY))
        print(f"gating: wrote {', '.join(outputs)} to {output_dir}; next: studies/rewardbench.py")


def describe(args, gated, data, split, seen, log, settings):
    """What gate.json holds."""
    parts = {}
    for name in ("validation", "held_out"):
        rows = split[name]
        parts[name] = gating.compare(
            gating.rewards(gated, data, rows), data.groups[rows], args.seed
        )
    shown = split["held_out"] if len(split["held_out"]) else split["validation"]
    of_prompts = shown[np.unique(data.groups[shown], return_index=True)[1]]
    frozen = gated.gate.frozen.numpy()
    return {
        "settings": settings,
        "pairs": {"path": str(args.pairs), "source": data.source, "left_out": len(data.left_out)},
        "attributes": gated.attributes,
        "verbosity": gated.model.verbosity,
        "frozen": {
            a: float(w) for a, w in zip(gated.attributes, frozen, strict=True) if np.isfinite(w)
        },
        "temperature": gated.gate.temperature,
        "scale": float(gated.gate.log_scale.detach().exp()),
        "centre": dict(zip(gated.attributes, gated.centre.tolist(), strict=True)),
        "spread": dict(zip(gated.attributes, gated.spread.tolist(), strict=True)),
        "n_pairs": {name: len(rows) for name, rows in split.items()},
        "n_prompts": {name: len(np.unique(data.groups[rows])) for name, rows in split.items()},
        "prompts_of_heads": gating.describe_seen(seen, data.groups, split),
        **parts,
        "null_reason": None
        if parts["held_out"]
        else gating.describe_no_held_out(seen, args.held_out_share),
        "weights": {"of": "held_out" if len(split["held_out"]) else "validation"}
        | gating.describe_weights(gated.attributes, gating.weights(gated, data, of_prompts)),
        "baselines": {
            "best_single": gated.single,
            "global_weights": dict(
                zip(gated.attributes, gated.global_weights.tolist(), strict=True)
            ),
        },
        "best_epoch": max(entry["epoch"] for entry in log if entry["best"]),
        "log": log,
    }


def report(result):
    counts, seen = result["n_pairs"], result["prompts_of_heads"]
    print(
        f"gating: {counts['fit']} pairs to fit, {counts['validation']} to validate, {counts['held_out']} held out"
    )
    print(f"gating: {seen['told']}")
    print(
        f"gating: epoch {result['best_epoch']} of {len(result['log'])} is the best; scale {result['scale']:.3g}"
    )
    if result["held_out"]:
        held, note = result["held_out"], {"best_single": result["baselines"]["best_single"]}
        print(
            f"{'held-out accuracy':36}{'[95 % interval]':>24}{'gate minus it':>28}  ({held['n_prompts']} prompts)"
        )
        for method, row in held["methods"].items():
            name = f"{method} ({note[method]})" if method in note else method
            gap = difference(held["gate_minus"].get(method))
            print(f"  {name:34}{tables.with_interval(row, 'accuracy'):>24}{gap:>28}")
    else:
        print(f"gating: no held-out accuracy: {result['null_reason']}")
    weights = result["weights"]
    print(
        f"{'weights':36}{'mean':>8}{'sd between prompts':>20}  ({weights['n_prompts']} prompts, {weights['of']})"
    )
    for name, mean in weights["mean"].items():
        frozen = "  frozen" if name in result["frozen"] else ""
        print(f"  {name:34}{mean:>8.3f}{weights['sd_between_prompts'][name]:>20.3f}{frozen}")
    print(
        f"  entropy, 1 for equal weights: {weights['relative_entropy']:.3f} of a prompt's weights, "
        f"{weights['entropy_of_mean']:.3f} of the mean weights"
    )


def difference(told):
    if told is None:
        return ""
    return f"{told['difference']:+.3f} [{told['ci95'][0]:+.3f}, {told['ci95'][1]:+.3f}]"


if __name__ == "__main__":
    console.run(main, "gating")
