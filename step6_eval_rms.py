"""Step 6: how well the reward models rank the responses of prompts they have never seen.

Every member and the aggregations mean, min (worst case), uwo (uncertainty-weighted) and first, on
the held-out prompts and on the test set where there is one, beside the baselines: a random scorer,
one constant, response length where it is known, and a linear Bradley-Terry probe fitted to the same
pairs.

With --pairs FILE: how often the reward models agree with the recorded choices of held-out pairs, by
subset, and how well sigmoid(score difference) is calibrated, before and after a temperature and an
isotonic map from calibration pairs.

Reads   what step 5 wrote to OUTPUT_DIR, DATA_DIR; or the pairs of --pairs
Writes  OUTPUT_DIR/eval_results_....json   all metrics with 95 % intervals over prompts
        OUTPUT_DIR/scores_{held_out,test}.npy   (E, n, K) float32 scores of every member, on one scale
        OUTPUT_DIR/linear_probe.npy        (D,) weights of the linear probe
        OUTPUT_DIR/preference_maps_....json   with --pairs: score difference -> probability (human_pairs.probability)
Example python step6_eval_rms.py --data_dir data --output_dir distill_out
"""

import time
from pathlib import Path

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.cli import console, flags, tables
from rewardlib.data import embeddings, pair_files, splits
from rewardlib.measures import intervals, ranking
from rewardlib.models import aggregation, scoring
from rewardlib.nets import mlp
from rewardlib.pipeline import baselines, recorded, run_record

COLUMNS = ("spearman", "pair_accuracy", "selected_quantile")


def parse_args(argv=None):
    parser = console.parser(__doc__)
    flags.add_run_flags(parser)
    flags.add_pairs_flag(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    settings = flags.run_settings(args)
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        if args.pairs:
            return evaluate_on_recorded(args, settings, output_dir)
        train, test = embeddings.load_pair(args.data_dir, cache_dir=output_dir)
        split, record = run_record.open_run(output_dir, settings, train)
        stem = run_record.stem(settings, settings["n_sample"])
        files = [member["file"] for member in record["members"]]
        inputs = {**train.digests, **(test.digests if test else {})}
        inputs |= {
            name: artifacts.sha256(output_dir / name)
            for name in (splits.FILE, f"pairs_{stem}.npy", *files)
        }
        work = artifacts.identity(__file__, settings, inputs)
        if artifacts.is_finished(output_dir, "step6", work):
            print(f"step6: already done in {output_dir} (FORCE=1 redoes it)")
            return
        started = time.time()

        fit_prompts = np.concatenate([split["calibration"], split["student_train"]])
        pairs = np.load(output_dir / f"pairs_{stem}.npy")
        probe = fit_probe(train, record, pairs)
        ensemble = scoring.load_members(
            output_dir, record, train.shape[2], mlp.TYPES[settings["precision"]]
        )
        constant = float(train.rewards[fit_prompts].mean())
        results = {"settings": settings, "pairs": record["pairs"], "n_members": len(files)}
        sets = {"held_out": (train, split["held_out"])}
        if test is not None:
            sets["test"] = (test, np.arange(test.shape[0]))
        outputs = ["linear_probe.npy"]
        for name, (data, prompts) in sets.items():
            raw = scoring.score_raw([*ensemble.models, probe], data, prompts, ensemble.dtype)
            scores = scoring.on_scale(ensemble, raw[:-1]).astype(np.float32)
            outputs.append(f"scores_{name}.npy")
            artifacts.write_npy(output_dir / outputs[-1], scores)
            scores = scores.astype(float)
            weights = intervals.resample_weights(
                len(prompts), seeds.rng(args.seed, "resample", name)
            )
            golden = data.rewards[prompts]
            results[name] = {
                "n_prompts": len(prompts),
                "n_responses": data.shape[1],
                "aggregations": {
                    kind: ranking.ranking_metrics(values, golden, weights)
                    for kind, values in aggregation.aggregate(scores).items()
                },
                "members": [ranking.ranking_metrics(member, golden, weights) for member in scores],
                "baselines": baselines.evaluate(
                    data, prompts, raw[-1].astype(float), constant, args.seed, weights
                ),
            }
            report(name, results[name], record["pairs"]["label_error"])
        results["test"] = results.get("test")
        name = f"eval_results_{stem}.json"
        artifacts.write_npy(output_dir / "linear_probe.npy", probe)
        artifacts.write_json(output_dir / name, results)
        artifacts.record(output_dir, "step6", work, [name, *outputs], started)
        print(f"step6: wrote {name} to {output_dir}; next: step7_isotonic_distillation.py")


def evaluate_on_recorded(args, settings, output_dir):
    """Evaluate step 5's members on the held-out pairs of --pairs."""

    data = pair_files.load(args.pairs)
    settings = recorded.run_settings(settings, data)
    roles, record = recorded.open_run(output_dir, settings, data)
    files = [member["file"] for member in record["members"]]
    inputs = {name: artifacts.sha256(output_dir / name) for name in (recorded.SPLIT_FILE, *files)}
    work = artifacts.identity(__file__, settings, {**data.responses.digests, **inputs})
    if artifacts.is_finished(output_dir, "step6", work):
        print(f"step6: already done in {output_dir} (FORCE=1 redoes it)")
        return
    started = time.time()
    dtype = mlp.TYPES[settings["precision"]]
    ensemble = scoring.load(
        [output_dir / file for file in files], data.responses, roles["train"], dtype
    )
    pairs = recorded.draw(data, roles["train"], args.seed)
    results = recorded.evaluate(ensemble, pairs, data, roles, args.seed)
    scale = {"files": files, "centre": ensemble.centre, "spread": ensemble.spread}
    stem = run_record.stem(settings, len(data))
    contents = {
        f"preference_maps_{stem}.json": {"maps": results.pop("maps"), "members": scale},
        f"eval_results_{stem}.json": {"settings": settings, "pairs": record["pairs"], **results},
    }
    for name, content in contents.items():
        artifacts.write_json(output_dir / name, content)
    artifacts.record(output_dir, "step6", work, list(contents), started)
    for line in recorded.summary(results):
        print(line)
    print(f"step6: wrote {' and '.join(contents)} to {output_dir}")


def fit_probe(train, record, pairs):
    """Weights of the linear probe on the annotated pairs (M, 5): prompt and response of side 0, of side 1, label."""
    flat = pairs[:, [0, 2]] * train.shape[1] + pairs[:, [1, 3]]
    touched, index = np.unique(flat, return_inverse=True)
    rows = train.take(touched // train.shape[1], touched % train.shape[1])
    fold_of = np.full(train.shape[0], -1)
    fold_of[record["prompts"]] = record["folds"]
    return baselines.fit_linear_probe(rows, index.reshape(-1, 2), pairs[:, 4], fold_of[pairs[:, 0]])


def report(name, result, label_error):
    print(
        f"{name}: {result['n_prompts']} prompts x {result['n_responses']} responses, trained with label error "
        f"{label_error:.3f}; mean over prompts [95 % interval]"
    )
    if undefined := result["aggregations"]["mean"]["n_prompts_without_pair_accuracy"]:
        print(
            f"  ranking is undefined for {undefined} prompts, whose golden rewards are all equal: left out of its means"
        )
    print(f"{'':24}{'Spearman':>23}{'pair accuracy':>23}{'selected quantile':>23}")
    members = {f"member {i}": row for i, row in enumerate(result["members"])}
    for label, row in {**members, **result["aggregations"], **result["baselines"]}.items():
        print(
            f"  {label:22}"
            + "".join(f"{tables.with_interval(row, column):>23}" for column in COLUMNS)
        )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
