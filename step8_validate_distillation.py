"""Step 8: the four variants side by side on held-out prompts, and on the test set where there is one.

Teacher ORM, Teacher + Isotonic, Student, Student + Isotonic: Spearman, pairwise accuracy,
best-of-n; MSE, R2 and reliability for the three that have a unit; intervals over prompts; paired
differences to the teacher; a few examples. Refuses when the manifests and records of steps 5 and 7
do not prove that held-out prompts entered no fit.

Reads   what steps 5 to 7 wrote to OUTPUT_DIR, DATA_DIR
Writes  OUTPUT_DIR/validation_results.json
        OUTPUT_DIR/predictions_{held_out,test}.npy   (4, n, K) the variants' predictions, in the order above
        OUTPUT_DIR/golden_{held_out,test}.npy        (n, K) golden rewards in calibrated units
Example python step8_validate_distillation.py --data_dir data --output_dir distill_out
"""

import time
from pathlib import Path

import numpy as np

from rewardlib import artifacts, calibration, seeds
from rewardlib.cli import console, flags, tables
from rewardlib.data import embeddings, splits
from rewardlib.errors import InputError
from rewardlib.measures import intervals, ranking
from rewardlib.models import model_files, scoring
from rewardlib.nets import mlp
from rewardlib.pipeline import leakage, run_record, variants


def parse_args(argv=None):
    parser = console.parser(__doc__)
    flags.add_run_flags(parser)
    flags.add_distillation_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    settings = flags.run_settings(args)
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        train, test = embeddings.load_pair(args.data_dir, cache_dir=output_dir)
        split, record = run_record.open_run(output_dir, settings, train)
        config = artifacts.read_json(output_dir / "distillation_config.json", "step 7")
        check_settings(config, settings, flags.distillation_settings(args), output_dir)
        proof = leakage.prove_no_leakage(output_dir, split, record, config)
        evaluated = find_evaluation(output_dir, settings, record, train, test)
        read = ("distillation_config.json", splits.FILE, config["student"]["file"], *evaluated)
        inputs = {**train.digests, **(test.digests if test else {})}
        inputs |= {name: artifacts.sha256(output_dir / name) for name in read}
        inputs |= {member["file"]: member["sha256"] for member in config["teacher"]["members"]}
        work = artifacts.identity(__file__, settings | config["distillation"], inputs)
        if artifacts.is_finished(output_dir, "step8", work):
            report(artifacts.read_json(output_dir / "validation_results.json", "step 8"))
            print(f"step8: already done in {output_dir} (FORCE=1 redoes it)")
            return
        started = time.time()

        fit_prompts = np.sort(np.concatenate([split["calibration"], split["student_train"]]))
        paths = [output_dir / member["file"] for member in config["teacher"]["members"]]
        for path, member in zip(paths, config["teacher"]["members"], strict=True):
            if not path.is_file() or artifacts.sha256(path) != member["sha256"]:
                raise InputError(
                    f"{path} is not the teacher that step 7 distilled; run step 7 again"
                )
        dtype = mlp.TYPES[settings["precision"]]
        own_members = [m["file"] for m in config["teacher"]["members"]] == [
            r["file"] for r in record["members"]
        ]
        teacher = None if own_members else scoring.load(paths, train, fit_prompts, dtype)
        student = model_files.load_mlp(output_dir / config["student"]["file"], train.shape[2])
        maps = [
            calibration.load(output_dir, f"isotonic_{name}_map") for name in ("teacher", "student")
        ]
        rankings = artifacts.read_json(output_dir / evaluated[0], "step 6")

        sets = {"held_out": (train, split["held_out"])}
        if test is not None:
            sets["test"] = (test, np.arange(test.shape[0]))
        blocks, outputs = {}, []
        for name, (data, prompts) in sets.items():
            if own_members:  # step 6 has scored them
                raw = np.load(output_dir / f"scores_{name}.npy").astype(float).mean(0)
            else:
                raw = scoring.score(teacher, data, prompts).mean(0)
            own = scoring.score_raw([student], data, prompts, dtype)[0].astype(float)
            values = (raw, maps[0](raw), own, maps[1](own))
            predictions = dict(zip(variants.VARIANTS, values, strict=True))
            golden = data.rewards[prompts]
            on_scale = variants.apply_target(golden, config["target"])
            weights = intervals.resample_weights(
                len(prompts), seeds.rng(args.seed, "resample", name)
            )
            blocks[name] = variants.validate(predictions, golden, on_scale, weights) | {
                "n_prompts": len(prompts),
                "n_responses": data.shape[1],
                "golden_variance": float(on_scale.var()),
                "golden_best_of_n": ranking.ranking_metrics(golden, golden, weights)["best_of_n"],
                "baselines": rankings[name]["baselines"],
                "against_teacher": variants.compare_with_teacher(
                    predictions, golden, weights, seeds.rng(args.seed, "sign flips", name)
                ),
                "scale_check": variants.scale_check(predictions, on_scale),
            }
            outputs += [f"predictions_{name}.npy", f"golden_{name}.npy"]
            artifacts.write_npy(output_dir / outputs[-2], np.stack(list(predictions.values())))
            artifacts.write_npy(output_dir / outputs[-1], on_scale)
        results = {
            **blocks["held_out"],
            "n_heldout_prompts": len(split["held_out"]),
            "test": blocks.get("test"),
            "settings": settings | config["distillation"],
            "target": config["target"],
            "calibrated_on": config["calibration"]["scores"],
            "label_error": record["pairs"]["label_error"],
            "no_leakage": proof,
        }
        artifacts.write_json(output_dir / "validation_results.json", results)
        artifacts.record(output_dir, "step8", work, [*outputs, "validation_results.json"], started)
        report(results)
        print(f"step8: wrote validation_results.json to {output_dir}")


def check_settings(config, settings, distillation, output_dir):
    """InputError unless step 7 distilled with these very settings."""
    told = {**config["settings"], **config["distillation"]}
    different = [
        f"{k} {told.get(k)!r}, not {v!r}"
        for k, v in {**settings, **distillation}.items()
        if told.get(k) != v
    ]
    if different:
        raise InputError(
            f"{output_dir}: expected a student of these settings, found {'; '.join(different)}; "
            "run step 7 with the settings you want"
        )


def find_evaluation(output_dir, settings, record, train, test):
    """Names of the files of step 6, results first; InputError unless it evaluated these models on these data."""
    entry = artifacts.read_manifest(output_dir).get(
        "step6", {"arguments": {}, "inputs": {}, "outputs": {}}
    )
    stem = run_record.stem(settings, settings["n_sample"])
    names = [
        f"eval_results_{stem}.json",
        "scores_held_out.npy",
        *(["scores_test.npy"] if test else []),
    ]
    expected = {**train.digests, **(test.digests if test else {})}
    read = (splits.FILE, f"pairs_{stem}.npy", *(member["file"] for member in record["members"]))
    expected |= {name: artifacts.sha256(output_dir / name) for name in read}
    same = entry["arguments"] == settings and all(
        entry["inputs"].get(k) == v for k, v in expected.items()
    )
    told = entry["outputs"]
    kept = (
        (output_dir / name).is_file()
        and artifacts.describe_file(output_dir / name) == told.get(name)
        for name in names
    )
    if not (same and all(kept)):
        raise InputError(
            f"{output_dir}: no evaluation of these settings and data found; run step 6 first"
        )
    return names


def report(results):
    report_block("held-out", results)
    if results["test"]:
        report_block("test", results["test"])
    print(
        f"no held-out prompt entered a fit ({results['no_leakage']['files_checked']} files checked)"
    )


def report_block(name, block):
    sizes = list(block["golden_best_of_n"])
    top = sizes[min(len(sizes), 4) - 1]
    print(
        f"{name}: {block['n_prompts']} prompts x {block['n_responses']} responses; mean over prompts [95 % interval]"
    )
    if undefined := block["Teacher ORM"]["n_prompts_without_pair_accuracy"]:
        print(
            f"  ranking is undefined for {undefined} prompts, whose golden rewards are all equal: left out of its means"
        )
    print(
        f"{'':20}{'Spearman':>25}{'pair accuracy':>25}{'MSE':>25}{'R2':>25}{'best of ' + top:>12}"
    )
    rows = {variant: block[variant] for variant in variants.VARIANTS} | block["baselines"]
    for label, row in rows.items():
        cells = [
            tables.with_interval(row, column)
            for column in ("spearman", "pair_accuracy", "mse", "r2")
        ]
        print(
            f"  {label:18}"
            + "".join(f"{cell:>25}" for cell in cells)
            + f"{row['best_of_n'][top]:>13.3f}"
        )
    print(f"  {'oracle':18}{'':>100}{block['golden_best_of_n'][top]:>13.3f}")
    print(f"  golden reward variance {block['golden_variance']:.3f}")
    for variant, differences in block["against_teacher"].items():
        d = differences["spearman"]
        if d["difference"] is not None:
            low, high = d["ci95"]
            interval = f"{d['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
            print(f"  {variant} - teacher, Spearman: {interval}, p = {d['p_value']:.3f}")


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
