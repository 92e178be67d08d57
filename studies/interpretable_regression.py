"""Stage 1 of the interpretable reward: a linear head for each attribute, debiased of verbosity.

Prompts are split into four parts: fit, validation, reference and held-out. Ridge regressions (to
ratings) or logistic regressions on score differences (to pairwise concept labels) choose their
strength on the validation prompts and are then fitted to fit and validation prompts. The penalty of
an attribute, score - penalty * verbosity score, is found on the reference prompts, which the heads
have not seen. Held-out prompts are only measured on. Method: ArmoRM, arXiv 2406.12845.

Reads   --data: rated responses, or pairs with concept labels, from interpretable_prepare.py
Writes  OUTPUT_DIR/attribute_heads.safetensors  heads (A, D), penalties (A,), offsets (A,)
        OUTPUT_DIR/attribute_heads.json         strengths, held-out metrics, baselines, penalty
                                                search, rho
        OUTPUT_DIR/regression_split.json        prompts of the four parts
Example python studies/interpretable_regression.py --data prepared/rated.safetensors \\
            --verbosity_attribute verbosity
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import logit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts, seeds
from rewardlib.artifacts import null_if_nan
from rewardlib.cli import console, kinds, tables
from rewardlib.errors import InputError
from studies.interpretable import (
    attribute_data,
    attribute_metrics,
    flag_values,
    multi_objective,
)

RECORD, SPLIT = "attribute_heads.json", "regression_split.json"
PATHS = ("data", "reference", "output_dir", "debug")


def make_parser():
    """The parser of all flags. Flags that contradict each other pass; parse_args refuses them."""
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs and outputs")
    group.add_argument(
        "--data", required=True, help="prepared file, or a quoted pattern of its shards"
    )
    group.add_argument(
        "--labels",
        choices=("ratings", "pairwise"),
        default="ratings",
        help="kind of the labels; pairwise: P(chosen is preferred) on each concept",
    )
    group.add_argument(
        "--attributes", nargs="+", metavar="NAME", help="attributes to fit; None: all"
    )
    group.add_argument("--output_dir", default="interpretable_out", help="folder for the results")
    group = parser.add_argument_group("regression")
    group.add_argument(
        "--intercept",
        type=kinds.switch,
        default=False,
        help="1: fit intercepts, to ratings only; the embeddings of the paper need none",
    )
    group = parser.add_argument_group("debiasing")
    group.add_argument(
        "--verbosity_attribute",
        default="verbosity",
        help="attribute that measures verbosity; none: no debiasing",
    )
    group.add_argument(
        "--threshold",
        type=kinds.positive,
        default=multi_objective.THRESHOLD,
        help="largest allowed |rho| with verbosity on reference prompts",
    )
    group.add_argument(
        "--penalty_search",
        choices=("root", "grid"),
        default="root",
        help="search for the zero of rho, or the 24 penalties of the paper in turn",
    )
    group.add_argument(
        "--allow_unreached",
        action="store_true",
        help="go on with the penalty of the smallest |rho| where none reaches the threshold",
    )
    group.add_argument(
        "--reference",
        help="prepared file to find penalties on; None: reference prompts of --data",
    )
    group = parser.add_argument_group("split")
    group.add_argument(
        "--validation_share",
        type=flag_values.share,
        default=0.15,
        help="share of the rows on validation prompts",
    )
    group.add_argument(
        "--reference_share",
        type=flag_values.share,
        default=0.15,
        help="share of the rows on reference prompts, without --reference",
    )
    group.add_argument(
        "--held_out_share",
        type=flag_values.share,
        default=0.2,
        help="share of the rows on held-out prompts",
    )
    group.add_argument("--seed", type=kinds.seed, default=6, help="random seed")
    return parser


def parse_args(argv=None):
    """The parsed flags; InputError where they contradict each other."""
    args = make_parser().parse_args(argv)
    if args.reference and args.verbosity_attribute == "none":
        raise InputError("--reference needs a --verbosity_attribute; leave one of them out")
    if args.intercept and args.labels == "pairwise":
        raise InputError(
            "--intercept needs --labels ratings: score differences have no intercept; leave it out"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    output_dir = artifacts.writable_dir(args.output_dir)
    data = attribute_data.read(
        args.data, labels=True, pairs=args.labels == "pairwise", attributes=args.attributes
    )
    verbosity = None if args.verbosity_attribute == "none" else args.verbosity_attribute
    if verbosity:
        data.column(verbosity)
    other = attribute_data.read(args.reference) if args.reference else None
    settings = {name: value for name, value in vars(args).items() if name not in PATHS}
    inputs = dict(data.digests)
    if other:
        inputs |= {f"reference {name}": digest for name, digest in other.digests.items()}
    with (
        artifacts.lock(output_dir),
        artifacts.work(output_dir, "regression", __file__, settings, inputs) as work,
    ):
        if work is None:
            report(artifacts.read_json(output_dir / RECORD, multi_objective.MADE_BY))
            return
        shares = shares_of(args, own_reference=bool(verbosity) and other is None)
        rng = seeds.rng(args.seed, "regression split")
        split = attribute_data.split_prompts(data.groups, shares, rng)

        fitted, model = fit(args, data, split, verbosity)
        prompts = {part: np.unique(data.groups[rows]) for part, rows in split.items()}
        debiasing = None
        if verbosity:
            model, debiasing, prompts["reference"] = debias(args, model, data, other, split)
        record = describe(args, settings, model, fitted, data, split)
        record["debiasing"] = debiasing

        multi_objective.save(output_dir, model, fitted.strengths, args.labels)
        work.outputs.append(multi_objective.HEADS)
        work.write_json(SPLIT, prompts)
        work.write_json(RECORD, record)
    report(artifacts.read_json(output_dir / RECORD, multi_objective.MADE_BY))
    print(
        f"regression: wrote {', '.join(work.outputs)} to {output_dir}; "
        "next: studies/interpretable_gating.py"
    )


# ------------------------------------------------------------------------------------------ fitting


def shares_of(args, own_reference):
    """{part: share of the rows}; the fit part gets what the other parts leave.

    own_reference: whether penalties are found on a part of --data.
    """
    parts = {"validation": args.validation_share, "held_out": args.held_out_share}
    parts |= {"reference": args.reference_share} if own_reference else {}
    if sum(parts.values()) >= 1:
        raise InputError(f"expected shares that leave rows to fit, found {parts}; lower them")
    return {"fit": 1 - sum(parts.values()), **parts}


def fit(args, data, split, verbosity):
    """(Fit of all attributes, AttributeModel with these heads and without penalties)."""
    if args.labels == "pairwise":
        fitted = multi_objective.fit_pairwise(data, split["fit"], split["validation"])
    else:
        fitted = multi_objective.fit_ridge(
            data, split["fit"], split["validation"], intercept=args.intercept
        )
    model = multi_objective.AttributeModel(
        heads=fitted.heads.astype(np.float32),
        penalties=np.zeros(len(data.attributes)),
        attributes=data.attributes,
        verbosity=verbosity,
        offsets=fitted.offsets,
    )
    return fitted, model


def debias(args, model, data, other, split):
    """(model with penalties, what the record says about debiasing, reference prompts).

    other: the file --reference, None where the reference prompts are a part of `data`.
    """
    if other is None:
        reference_data, rows = data, split["reference"]
    else:
        reference_data, rows = other, unseen_rows(other, data)
    reference = multi_objective.score_responses(model, reference_data, rows)
    penalties = multi_objective.find_penalties(
        reference[0],
        data.attributes,
        model.verbosity,
        args.threshold,
        args.penalty_search,
        args.allow_unreached,
    )
    model = replace(model, penalties=penalties.penalties)
    held_out = multi_objective.score_responses(model, data, split["held_out"])
    debiasing = describe_debiasing(args, model, penalties, reference, held_out)
    return model, debiasing, np.unique(reference_data.groups[rows])


def unseen_rows(other, data):
    """Rows of the reference file whose prompts are not in the data."""
    known = np.isin(other.groups, data.groups)
    if known.any():
        print(
            f"regression: {known.sum()} of {len(known)} rows of {other.path} have prompts of "
            f"{data.path} and are left out"
        )
    if known.all():
        raise InputError(
            f"{other.path}: no prompts that are not in {data.path}; take another reference"
        )
    return np.flatnonzero(~known)


# ------------------------------------------------------------------------------------------- record


def describe(args, settings, model, fitted, data, split):
    """What attribute_heads.json holds, without debiasing."""
    return {
        "settings": settings,
        "data": {
            "path": str(args.data),
            "source": data.source,
            "n": len(data.ids),
            "left_out": len(data.left_out),
        },
        "n_prompts": {part: len(np.unique(data.groups[rows])) for part, rows in split.items()},
        "n_rows": {part: len(rows) for part, rows in split.items()},
        "attributes": list(data.attributes),
        "verbosity": model.verbosity,
        "regression": describe_regression(args, model, fitted, data, split),
    }


def describe_regression(args, model, fitted, data, split):
    """{attribute: labels, strength, validation losses, held-out metrics of head and constant}."""
    rows, result = split["held_out"], {}
    train_rows = np.concatenate([split["fit"], split["validation"]])
    raw = multi_objective.score_rows(model, data, rows)
    predicted = raw[:, 0] - raw[:, 1] if data.is_pairs else raw
    of_labels = attribute_metrics.of_preferences if data.is_pairs else attribute_metrics.of_ratings
    for a, name in enumerate(data.attributes):
        constant = float(np.nanmean(data.labels[train_rows, a], dtype=float))
        if data.is_pairs:
            constant = logit(np.clip(constant, 1e-6, 1 - 1e-6))  # finite where all labels agree
        n_labels = {
            part: int(np.isfinite(data.labels[part_rows, a]).sum())
            for part, part_rows in split.items()
        }
        losses = {f"{s:g}": fitted.losses[i, a] for i, s in enumerate(multi_objective.STRENGTHS)}
        rng = seeds.rng(args.seed, "resample", name)
        result[name] = {
            "n": n_labels,
            "strength": fitted.strengths[a],
            "validation_loss": losses,
            "held_out": of_labels(
                predicted[:, a], data.labels[rows, a], data.groups[rows], constant, rng
            ),
        }
    return result


def describe_debiasing(args, model, penalties, reference, held_out):
    """Penalties, their search, and rho with the verbosity score before and after debiasing.

    penalties: multi_objective.Penalties; reference, held_out: (raw scores (r, A), prompt numbers
    (r,)) of the responses of each part.
    """
    v, result = list(model.attributes).index(model.verbosity), {}
    for a, name in enumerate(model.attributes):
        tried = [[penalty, null_if_nan(rho)] for penalty, rho in penalties.tried[a]]
        result[name] = {"penalty": model.penalties[a], "tried": tried}
        for part, (raw, groups) in (("reference", reference), ("held_out", held_out)):
            rng = seeds.rng(args.seed, "rho", part, name)
            debiased = multi_objective.debias(model, raw)
            result[name][part] = {
                "before": attribute_metrics.spearman(raw[:, a], raw[:, v], groups, rng),
                "after": attribute_metrics.spearman(debiased[:, a], raw[:, v], groups, rng),
            }
    return {
        "threshold": args.threshold,
        "search": args.penalty_search,
        "reference": {
            "path": args.reference,
            "n": len(reference[0]),
            "n_prompts": len(np.unique(reference[1])),
        },
        "unreached": penalties.unreached,
        "attributes": result,
    }


# ------------------------------------------------------------------------------------------- report


def report(record):
    """Print the tables of a record: held-out errors, then rho before and after debiasing."""
    parts = ", ".join(f"{part} {n} prompts" for part, n in record["n_prompts"].items())
    print(f"regression: {parts}")
    is_pairwise = record["settings"]["labels"] == "pairwise"
    columns = ("log_loss", "accuracy") if is_pairwise else ("mse", "r2", "spearman")
    error = columns[0]
    print(f"held-out prompts [95 % interval]; constant: {error} of the mean training label")
    titles = "".join(f" {title:>26}" for title in (*columns, "constant"))
    print(f"{'':26}{'labels':>8}{'strength':>9}{titles}")
    for name, row in record["regression"].items():
        held_out, constant = row["held_out"], row["held_out"]["baseline"]
        cells = [tables.with_interval(held_out, column) for column in columns]
        cells.append(tables.with_interval(constant, error))
        n_labels = row["n"]["fit"] + row["n"]["validation"]
        numbers = f"{n_labels:>8}{row['strength']:>9g}"
        print(f"  {name[:23]:24}{numbers}" + "".join(f" {cell:>26}" for cell in cells))
        if held_out[error] is not None and held_out[error] > constant[error]:
            can_help = error == "mse" and not record["settings"]["intercept"]
            hint = "; --intercept 1 may help" if can_help else ""
            print(f"  warning: {name} is predicted worse than by a constant{hint}")
    if record["debiasing"]:
        report_debiasing(record["debiasing"], record["verbosity"])


def report_debiasing(debiasing, verbosity):
    """Print penalties and rho, with a warning where debiasing does not hold on held-out prompts."""
    reference, threshold = debiasing["reference"], debiasing["threshold"]
    print(
        f"rho with the {verbosity} score [95 % interval]; {debiasing['search']} search for "
        f"|rho| <= {threshold:g} on {reference['n']} responses to {reference['n_prompts']} "
        "reference prompts"
    )
    print(f"{'':26}{'penalty':>10}{'reference':>19}{'held out':>50}")
    for name, row in debiasing["attributes"].items():
        if name == verbosity:
            continue
        on_reference, on_held_out = (
            [tables.with_interval(row[part][when], "spearman") for when in ("before", "after")]
            for part in ("reference", "held_out")
        )
        change = " -> ".join(cell.split()[0] for cell in on_reference)  # without the intervals
        held_out_change = " -> ".join(on_held_out)
        print(f"  {name[:23]:24}{row['penalty']:>10.4g}{change:>19}{held_out_change:>50}")
        low, high = row["held_out"]["after"]["spearman_ci95"]
        if low is not None and (low > threshold or high < -threshold):
            print(
                f"  warning: |rho| of {name} stays above the threshold on held-out prompts; find "
                "the penalty on more prompts"
            )
    if debiasing["unreached"]:
        names = ", ".join(debiasing["unreached"])
        print(f"  warning: |rho| stays above {threshold:g} on reference prompts for {names}")


if __name__ == "__main__":
    console.run(main, Path(__file__).stem)
