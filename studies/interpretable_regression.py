"""Stage 1 of the interpretable reward: a linear head per attribute, made uncorrelated with verbosity.

Prompts are split into fit, validation, reference and held-out ones. Ridge regressions (ratings) or
logistic regressions on score differences (pairwise concept labels) take their strength from the
validation prompts and are fitted again to fit and validation prompts. The penalty of an attribute,
score - penalty * verbosity score, is found on the reference prompts, which the heads have not seen.
Held-out prompts are only measured on. Method: ArmoRM, arXiv 2406.12845.

Reads   --data: rated responses, or pairs with concept labels, as interpretable_prepare.py writes them
Writes  OUTPUT_DIR/attribute_heads.safetensors  heads (A, D), penalties (A,), offsets (A,)
        OUTPUT_DIR/attribute_heads.json         strengths, held-out metrics, baselines, penalty search, rho
        OUTPUT_DIR/regression_split.json        prompts of the four parts
Example python studies/interpretable_regression.py --data prepared/rated.safetensors --verbosity_attribute verbosity
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import logit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts, seeds
from rewardlib.artifacts import null_if_nan
from rewardlib.cli import console, kinds, tables
from rewardlib.errors import InputError
from studies.interpretable import attribute_data, attribute_metrics, multi_objective

RECORD, SPLIT = "attribute_heads.json", "regression_split.json"
OUTPUTS = (multi_objective.HEADS, RECORD, SPLIT)
PATHS = ("data", "reference", "output_dir", "debug")


def parse_args(argv=None):
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs and outputs")
    group.add_argument(
        "--data", required=True, help="prepared file, or a pattern of its shards, quoted"
    )
    group.add_argument(
        "--labels", choices=("ratings", "pairwise"), default="ratings", help="what the labels are"
    )
    group.add_argument(
        "--attributes", nargs="+", metavar="NAME", help="attributes to fit; None: all"
    )
    group.add_argument("--output_dir", default="interpretable_out", help="results")
    group = parser.add_argument_group("regression")
    group.add_argument(
        "--intercept",
        type=kinds.switch,
        default=False,
        help="1: fit one to ratings; the paper's backbone needs none",
    )
    group = parser.add_argument_group("debiasing")
    group.add_argument(
        "--verbosity_attribute", default="verbosity", help="an attribute, or none: no debiasing"
    )
    group.add_argument(
        "--threshold",
        type=kinds.positive,
        default=multi_objective.THRESHOLD,
        help="largest |rho| on reference prompts",
    )
    group.add_argument(
        "--penalty_search",
        choices=("root", "grid"),
        default="root",
        help="grid: the paper's 24 values",
    )
    group.add_argument(
        "--allow_unreached",
        action="store_true",
        help="keep the nearest penalty where none suffices",
    )
    group.add_argument(
        "--reference", help="prepared file to find penalties on; None: reference prompts of --data"
    )
    group = parser.add_argument_group("split")
    group.add_argument(
        "--validation_share", type=share, default=0.15, help="of the rows, by prompt"
    )
    group.add_argument(
        "--reference_share",
        type=share,
        default=0.15,
        help="of the rows, unless --reference is given",
    )
    group.add_argument("--held_out_share", type=share, default=0.2, help="of the rows")
    group.add_argument("--seed", type=kinds.seed, default=6, help="of every random draw")
    args = parser.parse_args(argv)
    if args.reference and args.verbosity_attribute == "none":
        raise InputError(
            "--reference: expected a --verbosity_attribute beside it, found none; leave one of them out"
        )
    if args.intercept and args.labels == "pairwise":
        raise InputError(
            "--intercept: expected --labels ratings, found pairwise: differences have none; leave it out"
        )
    return args


def share(text):
    value = kinds.positive(text)
    if value >= 1:
        raise InputError(f"expected a share between 0 and 1, found {text}")
    return value


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
    inputs = {
        **data.digests,
        **{f"reference {name}": told for name, told in (other.digests if other else {}).items()},
    }
    with artifacts.lock(output_dir):
        work = artifacts.identity(__file__, settings, inputs)
        if artifacts.is_finished(output_dir, "regression", work):
            report(artifacts.read_json(output_dir / RECORD, multi_objective.MADE_BY))
            print(f"regression: already done in {output_dir} (FORCE=1 redoes it)")
            return
        started = time.time()
        shares = shares_of(args, own_reference=bool(verbosity) and other is None)
        split = attribute_data.split_prompts(
            data.groups, shares, seeds.rng(args.seed, "regression split")
        )

        if args.labels == "pairwise":
            fitted = multi_objective.fit_pairwise(data, split["fit"], split["validation"])
        else:
            fitted = multi_objective.fit_ridge(
                data, split["fit"], split["validation"], intercept=args.intercept
            )
        model = multi_objective.AttributeModel(
            fitted.heads.astype(np.float32),
            np.zeros(len(data.attributes)),
            data.attributes,
            verbosity,
            fitted.offsets,
        )
        prompts = {role: np.unique(data.groups[rows]) for role, rows in split.items()}
        debiasing = None
        if verbosity:
            rows = split["reference"] if other is None else unseen_rows(other, data)
            prompts["reference"] = np.unique((other or data).groups[rows])
            reference = multi_objective.score_responses(model, other or data, rows)
            search = args.threshold, args.penalty_search, args.allow_unreached
            found = multi_objective.find_penalties(
                reference[0], data.attributes, verbosity, *search
            )
            model = replace(model, penalties=found.penalties)
            held_out = multi_objective.score_responses(model, data, split["held_out"])
            debiasing = describe_debiasing(args, model, found, reference, held_out)
        record = {
            "settings": settings,
            "data": {
                "path": str(args.data),
                "source": data.source,
                "n": len(data.ids),
                "left_out": len(data.left_out),
            },
            "n_prompts": {role: len(np.unique(data.groups[rows])) for role, rows in split.items()},
            "n_rows": {role: len(rows) for role, rows in split.items()},
            "attributes": list(data.attributes),
            "verbosity": verbosity,
            "regression": describe_regression(args, model, fitted, data, split),
            "debiasing": debiasing,
        }
        multi_objective.save(output_dir, model, fitted.strengths, args.labels)
        artifacts.write_json(output_dir / SPLIT, prompts)
        artifacts.write_json(output_dir / RECORD, record)
        artifacts.record(output_dir, "regression", work, OUTPUTS, started)
        report(artifacts.read_json(output_dir / RECORD, multi_objective.MADE_BY))
        print(
            f"regression: wrote {', '.join(OUTPUTS)} to {output_dir}; next: studies/interpretable_gating.py"
        )


def shares_of(args, own_reference):
    """{part: share of the rows}; what the others leave is fitted on."""
    parts = {"validation": args.validation_share, "held_out": args.held_out_share}
    parts |= {"reference": args.reference_share} if own_reference else {}
    if sum(parts.values()) >= 1:
        raise InputError(f"expected shares that leave rows to fit, found {parts}; lower them")
    return {"fit": 1 - sum(parts.values()), **parts}


def unseen_rows(other, data):
    """Rows of the reference file whose prompts are not in the data."""
    known = np.isin(other.groups, data.groups)
    if known.any():
        print(
            f"regression: {known.sum()} of {len(known)} rows of {other.path} have prompts of {data.path}: left out"
        )
    if known.all():
        raise InputError(
            f"{other.path}: expected prompts that {data.path} has not, found none; take another reference"
        )
    return np.flatnonzero(~known)


def describe_regression(args, model, fitted, data, split):
    """{attribute: labels, strength, validation losses, held-out metrics beside those of a constant}."""
    rows, result = split["held_out"], {}
    train = np.concatenate([split["fit"], split["validation"]])
    raw = multi_objective.score_rows(model, data, rows)
    predicted = raw[:, 0] - raw[:, 1] if data.is_pairs else raw
    for a, name in enumerate(data.attributes):
        constant = float(np.nanmean(data.labels[train, a], dtype=float))
        if data.is_pairs:
            constant = logit(np.clip(constant, 1e-6, 1 - 1e-6))
        measure = (
            attribute_metrics.of_preferences if data.is_pairs else attribute_metrics.of_ratings
        )
        rng = seeds.rng(args.seed, "resample", name)
        result[name] = {
            "n": {
                role: int(np.isfinite(data.labels[part, a]).sum()) for role, part in split.items()
            },
            "strength": fitted.strengths[a],
            "validation_loss": {
                f"{s:g}": fitted.losses[i, a] for i, s in enumerate(multi_objective.STRENGTHS)
            },
            "held_out": measure(
                predicted[:, a], data.labels[rows, a], data.groups[rows], constant, rng
            ),
        }
    return result


def describe_debiasing(args, model, found, reference, held_out):
    """Penalties, their search, and rho with the verbosity score before and after on reference and held-out prompts."""
    v, result = list(model.attributes).index(model.verbosity), {}
    for a, name in enumerate(model.attributes):
        tried = [[penalty, null_if_nan(rho)] for penalty, rho in found.tried[a]]
        result[name] = {"penalty": model.penalties[a], "tried": tried}
        for part, (raw, groups) in (("reference", reference), ("held_out", held_out)):
            rng, debiased = (
                seeds.rng(args.seed, "rho", part, name),
                multi_objective.debias(model, raw),
            )
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
        "unreached": found.unreached,
        "attributes": result,
    }


def report(record):
    print(
        "regression: " + ", ".join(f"{part} {n} prompts" for part, n in record["n_prompts"].items())
    )
    columns = (
        ("log_loss", "accuracy")
        if record["settings"]["labels"] == "pairwise"
        else ("mse", "r2", "spearman")
    )
    error = columns[0]
    print(f"held-out prompts [95 % interval]; constant: {error} of the mean training label")
    print(
        f"{'':26}{'labels':>8}{'strength':>9}"
        + "".join(f" {c:>26}" for c in (*columns, "constant"))
    )
    for name, row in record["regression"].items():
        held, constant = row["held_out"], row["held_out"]["baseline"]
        cells = [
            *(tables.with_interval(held, column) for column in columns),
            tables.with_interval(constant, error),
        ]
        n = row["n"]["fit"] + row["n"]["validation"]
        print(
            f"  {name[:23]:24}{n:>8}{row['strength']:>9g}"
            + "".join(f" {cell:>26}" for cell in cells)
        )
        if held[error] is not None and held[error] > constant[error]:
            hint = (
                ""
                if record["settings"]["intercept"] or error != "mse"
                else "; --intercept 1 may mend it"
            )
            print(f"  warning: {name} is predicted worse than by a constant{hint}")
    if record["debiasing"]:
        report_debiasing(record["debiasing"], record["verbosity"])


def report_debiasing(debiasing, verbosity):
    told = debiasing["reference"]
    print(
        f"rho with the {verbosity} score [95 % interval]; {debiasing['search']} search for |rho| <= "
        f"{debiasing['threshold']:g} on {told['n']} responses to {told['n_prompts']} reference prompts"
    )
    print(f"{'':26}{'penalty':>10}{'reference':>19}{'held out':>50}")
    for name, row in debiasing["attributes"].items():
        if name != verbosity:
            near = [
                tables.with_interval(row["reference"][when], "spearman").split()[0]
                for when in ("before", "after")
            ]
            held = [
                tables.with_interval(row["held_out"][when], "spearman")
                for when in ("before", "after")
            ]
            print(
                f"  {name[:23]:24}{row['penalty']:>10.4g}{' -> '.join(near):>19}{' -> '.join(held):>50}"
            )
            low, high = row["held_out"]["after"]["spearman_ci95"]
            if low is not None and (low > debiasing["threshold"] or high < -debiasing["threshold"]):
                print(
                    f"  warning: {name} keeps more than that on held-out prompts; find the penalty on more prompts"
                )
    if debiasing["unreached"]:
        print(
            f"  warning: |rho| stays above {debiasing['threshold']:g} for {', '.join(debiasing['unreached'])}"
        )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem)
