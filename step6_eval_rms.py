"""Step 6: how well the reward models rank the responses of prompts they have never seen.

Held-out prompts, and the test set if there is one, are scored by every member and by the
aggregations mean, min (worst case), uwo (uncertainty-weighted), lcb (lower confidence bound) and
first. The baselines stand beside them: a random scorer, one constant, response length where it is
known, and a linear Bradley-Terry probe fitted to the same pairs.

With --pairs FILE this step measures how often the reward models agree with the recorded choices of
held-out pairs, by subset, and how well sigmoid(score difference) is calibrated, before and after a
temperature and an isotonic map, both fitted on calibration pairs.

Reads   what step 5 wrote to OUTPUT_DIR, DATA_DIR; or the pairs of --pairs
Writes  to OUTPUT_DIR
        eval_results_....json           all metrics with 95 % intervals over prompts
        scores_{held_out,test}.npy      (E, n, K) float32 scores of every member, on one scale
        linear_probe.npy                (D,) weights of the linear probe
        preference_maps_....json        with --pairs: from score difference to probability
Example python step6_eval_rms.py --data_dir data --output_dir distill_out
"""

from pathlib import Path

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.cli import console, flags, tables
from rewardlib.data import embeddings, pair_files, pairs, splits
from rewardlib.measures import intervals, ranking
from rewardlib.models import aggregation, scoring
from rewardlib.pipeline import baselines, recorded, run_record

COLUMNS = ("spearman", "pair_accuracy", "selected_quantile")


def make_parser():
    parser = console.parser(__doc__)
    flags.add_run_flags(parser)
    flags.add_pairs_flag(parser)
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    settings = flags.run_settings(args)
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        evaluate = evaluate_on_recorded if args.pairs else evaluate_on_prompts
        evaluate(args, settings, output_dir)


def evaluate_on_prompts(args, settings, output_dir):
    """Rank the responses of held-out prompts, and of the test set."""
    train, test = embeddings.load_pair(args.data_dir, cache_dir=output_dir)
    split, record = run_record.open_run(output_dir, settings, train)
    stem = run_record.stem(settings)
    files = [splits.FILE, f"pairs_{stem}.npy", *(member["file"] for member in record["members"])]
    inputs = {**train.digests, **(test.digests if test else {})}
    inputs |= {name: artifacts.sha256(output_dir / name) for name in files}
    with artifacts.work(output_dir, "step6", __file__, settings, inputs) as work:
        if work is None:
            return
        fit_prompts = np.concatenate([split["calibration"], split["student_train"]])
        constant = float(train.rewards[fit_prompts].mean())
        probe = fit_probe(train, record, np.load(output_dir / f"pairs_{stem}.npy"))
        work.write_npy("linear_probe.npy", probe)
        dtype = flags.computing_type(args)
        ensemble = scoring.load_members(output_dir, record, train.shape[2], dtype)
        results = {
            "settings": settings,
            "pairs": record["pairs"],
            "n_members": len(record["members"]),
        }
        sets = {"held_out": (train, split["held_out"])}
        if test is not None:
            sets["test"] = (test, np.arange(test.shape[0]))
        for name, (data, prompts) in sets.items():
            raw = scoring.score_raw([*ensemble.models, probe], data, prompts, ensemble.dtype)
            scores = scoring.on_scale(ensemble, raw[:-1]).astype(np.float32)
            work.write_npy(f"scores_{name}.npy", scores)
            results[name] = evaluate(args, name, data, prompts, scores, raw[-1], constant)
            report(name, results[name], record["pairs"]["label_error"])
        results["test"] = results.get("test")
        work.write_json(f"eval_results_{stem}.json", results)
    print(
        f"step6: wrote eval_results_{stem}.json to {output_dir}; "
        "next: step7_isotonic_distillation.py"
    )


def fit_probe(train, record, pairs_M5):
    """Weights (D,) of the linear probe on annotated pairs: two prompts and responses, label."""
    rows_read, index = pairs.rows_of(pairs_M5[:, :4], train.shape[1])
    fold_of = np.full(train.shape[0], -1)
    fold_of[record["prompts"]] = record["folds"]
    folds = fold_of[pairs_M5[:, 0]]
    return baselines.fit_linear_probe(train.take(*rows_read), index, pairs_M5[:, 4], folds)


def evaluate(args, name, data, prompts, scores_ENK, probe_NK, constant):
    """Metrics of aggregations, members and baselines on the responses to `prompts`."""
    scores_ENK, golden_NK = scores_ENK.astype(float), data.rewards[prompts]
    weights = intervals.resample_weights(len(prompts), seeds.rng(args.seed, "resample", name))
    return {
        "n_prompts": len(prompts),
        "n_responses": data.shape[1],
        "aggregations": {
            kind: ranking.ranking_metrics(values_NK, golden_NK, weights)
            for kind, values_NK in aggregation.aggregate(scores_ENK).items()
        },
        "members": [
            ranking.ranking_metrics(member_NK, golden_NK, weights) for member_NK in scores_ENK
        ],
        "baselines": baselines.evaluate(
            data, prompts, probe_NK.astype(float), constant, args.seed, weights
        ),
    }


def evaluate_on_recorded(args, settings, output_dir):
    """Compare the members with the recorded choices of the held-out pairs of --pairs."""
    data = pair_files.load(args.pairs)
    settings = recorded.run_settings(settings, data)
    roles, record = recorded.open_run(output_dir, settings, data)
    files = [member["file"] for member in record["members"]]
    inputs = {name: artifacts.sha256(output_dir / name) for name in (recorded.SPLIT_FILE, *files)}
    inputs = {**data.responses.digests, **inputs}
    with artifacts.work(output_dir, "step6", __file__, settings, inputs) as work:
        if work is None:
            return
        dtype, paths = flags.computing_type(args), [output_dir / file for file in files]
        ensemble = scoring.load(paths, data.responses, roles["train"], dtype)
        training = recorded.draw(data, roles["train"], args.seed)
        results = recorded.evaluate(ensemble, training, data, roles, args.seed)
        scale = {"files": files, "centre": ensemble.centre, "spread": ensemble.spread}
        stem = run_record.stem(settings)
        maps = {"maps": results.pop("maps"), "members": scale}
        work.write_json(f"preference_maps_{stem}.json", maps)
        results = {"settings": settings, "pairs": record["pairs"], **results}
        work.write_json(f"eval_results_{stem}.json", results)
        for line in recorded.summary(results):
            print(line)
    print(f"step6: wrote {' and '.join(work.outputs)} to {output_dir}")


def report(name, result, label_error):
    print(
        f"{name}: {result['n_prompts']} prompts x {result['n_responses']} responses, trained with "
        f"label error {label_error:.3f}; mean over prompts [95 % interval]"
    )
    tables.print_undefined(result["aggregations"]["mean"])
    print(f"{'':24}{'Spearman':>23}{'pair accuracy':>23}{'selected quantile':>23}")
    members = {f"member {i}": row for i, row in enumerate(result["members"])}
    for label, row in {**members, **result["aggregations"], **result["baselines"]}.items():
        cells = [f"{tables.with_interval(row, column):>23}" for column in COLUMNS]
        print(f"  {label:22}{''.join(cells)}")


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
