"""Step 8: the four variants side by side on held-out prompts, and on the test set if there is one.

The variants are Teacher ORM, Teacher + Isotonic, Student and Student + Isotonic. This step measures
Spearman, pairwise accuracy and best-of-n of all four, MSE, R2 and reliability of the three that
have a unit, all with intervals over prompts, and paired differences to the teacher. Where the
manifests and records of steps 5 and 7 do not prove that held-out prompts entered no fit, this step
refuses to run.

Reads   what steps 5 to 7 wrote to OUTPUT_DIR, DATA_DIR
Writes  to OUTPUT_DIR
        validation_results.json
        predictions_{held_out,test}.npy   (4, n, K) predictions of the variants, in that order
        golden_{held_out,test}.npy        (n, K) golden rewards in calibrated units
Example python step8_validate_distillation.py --data_dir data --output_dir distill_out
"""

from collections.abc import Callable
from dataclasses import dataclass
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


def make_parser():
    parser = console.parser(__doc__)
    flags.add_run_flags(parser)
    flags.add_distillation_flags(parser)
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    settings = flags.run_settings(args)
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        train, test = embeddings.load_pair(args.data_dir, cache_dir=output_dir)
        split, record = run_record.open_run(output_dir, settings, train)
        config = artifacts.read_json(output_dir / "distillation_config.json", "step 7")
        check_settings(args, settings, config, output_dir)
        proof = leakage.prove_no_leakage(output_dir, split, record, config)
        evaluation = find_evaluation(output_dir, settings, record, train, test)
        files = ["distillation_config.json", splits.FILE, config["student"]["file"], *evaluation]
        inputs = {**train.digests, **(test.digests if test else {})}
        inputs |= {name: artifacts.sha256(output_dir / name) for name in files}
        inputs |= {member["file"]: member["sha256"] for member in config["teacher"]["members"]}
        settings |= config["distillation"]
        with artifacts.work(output_dir, "step8", __file__, settings, inputs) as work:
            if work is None:
                report(artifacts.read_json(output_dir / "validation_results.json", "step 8"))
                return
            sets = {"held_out": (train, split["held_out"])}
            if test is not None:
                sets["test"] = (test, np.arange(test.shape[0]))
            scorers = open_scorers(args, output_dir, train, split, record, config)
            rankings = artifacts.read_json(output_dir / evaluation[0], "step 6")
            blocks = {}
            for name, (data, prompts) in sets.items():
                predictions = predict(args, output_dir, name, data, prompts, scorers)
                baselines = rankings[name]["baselines"]
                blocks[name] = validate(args, name, data, prompts, predictions, config, baselines)
                golden_NK = variants.apply_target(data.rewards[prompts], config["target"])
                work.write_npy(f"predictions_{name}.npy", np.stack(list(predictions.values())))
                work.write_npy(f"golden_{name}.npy", golden_NK)
            results = {
                **blocks["held_out"],
                "n_heldout_prompts": len(split["held_out"]),
                "test": blocks.get("test"),
                "settings": settings,
                "target": config["target"],
                "calibrated_on": config["calibration"]["scores"],
                "label_error": record["pairs"]["label_error"],
                "no_leakage": proof,
            }
            work.write_json("validation_results.json", results)
    report(results)
    print(f"step8: wrote validation_results.json to {output_dir}")


def check_settings(args, settings, config, output_dir):
    """InputError unless step 7 distilled with these very settings."""
    starts_from_mlp = all(model_files.is_mlp(m["file"]) for m in config["teacher"]["members"])
    student = flags.distillation_settings(args) | flags.student_settings(args, starts_from_mlp)
    recorded = {**config["settings"], **config["distillation"]}
    if different := run_record.differences(recorded, settings | student):
        raise InputError(
            f"{output_dir}: expected a student of these settings, found {different}; "
            "run step 7 with the settings you want"
        )


def find_evaluation(output_dir, settings, record, train, test):
    """Files of step 6, results first; InputError unless it evaluated these models on these data."""
    entry = artifacts.read_manifest(output_dir).get("step6")
    stem = run_record.stem(settings)
    names = [f"eval_results_{stem}.json", "scores_held_out.npy"]
    if test is not None:
        names.append("scores_test.npy")
    expected = {**train.digests, **(test.digests if test else {})}
    files = [splits.FILE, f"pairs_{stem}.npy", *(member["file"] for member in record["members"])]
    expected |= {name: artifacts.sha256(output_dir / name) for name in files}
    if not (
        entry
        and entry["arguments"] == settings
        and all(entry["inputs"].get(name) == digest for name, digest in expected.items())
        and all(is_unchanged(output_dir / name, entry) for name in names)
    ):
        raise InputError(
            f"{output_dir}: no evaluation of these settings and data found; run step 6 first"
        )
    return names


def is_unchanged(path, entry):
    return path.is_file() and artifacts.describe_file(path) == entry["outputs"].get(path.name)


@dataclass(frozen=True)
class Scorers:
    """What the variants come from. teacher: None where step 6 has scored its members."""

    teacher: scoring.ScaledEnsemble | None
    student: mlp.MLP
    teacher_map: Callable
    student_map: Callable


def open_scorers(args, output_dir, train, split, record, config):
    """Teacher, student and maps of step 7; InputError where a checkpoint of the teacher changed."""
    members = config["teacher"]["members"]
    for path, member in ((output_dir / member["file"], member) for member in members):
        if not path.is_file() or artifacts.sha256(path) != member["sha256"]:
            raise InputError(f"{path} is not the teacher that step 7 distilled; run step 7 again")
    teacher = None
    files = [member["file"] for member in members]
    if files != [member["file"] for member in record["members"]]:
        fit_prompts = np.sort(np.concatenate([split["calibration"], split["student_train"]]))
        paths = [output_dir / file for file in files]
        teacher = scoring.load(paths, train, fit_prompts, flags.computing_type(args))
    return Scorers(
        teacher,
        model_files.load_mlp(output_dir / config["student"]["file"], train.shape[2]),
        calibration.load(output_dir, "isotonic_teacher_map"),
        calibration.load(output_dir, "isotonic_student_map"),
    )


def predict(args, output_dir, name, data, prompts, scorers):
    """{variant: (n, K)} predictions for the responses to `prompts`."""
    if scorers.teacher is None:
        teacher_NK = np.load(output_dir / f"scores_{name}.npy").astype(float).mean(0)
    else:
        teacher_NK = scoring.score(scorers.teacher, data, prompts).mean(0)
    dtype = flags.computing_type(args)
    student_NK = scoring.score_raw([scorers.student], data, prompts, dtype)[0].astype(float)
    predictions = (
        teacher_NK,
        scorers.teacher_map(teacher_NK),
        student_NK,
        scorers.student_map(student_NK),
    )
    return dict(zip(variants.VARIANTS, predictions, strict=True))


def validate(args, name, data, prompts, predictions, config, baselines):
    """Metrics of the four variants on one set of prompts, beside the baselines of step 6."""
    rewards_NK = data.rewards[prompts]
    golden_NK = variants.apply_target(rewards_NK, config["target"])
    weights = intervals.resample_weights(len(prompts), seeds.rng(args.seed, "resample", name))
    oracle = ranking.ranking_metrics(rewards_NK, rewards_NK, weights)
    return variants.validate(predictions, rewards_NK, golden_NK, weights) | {
        "n_prompts": len(prompts),
        "n_responses": data.shape[1],
        "golden_variance": float(golden_NK.var()),
        "golden_best_of_n": oracle["best_of_n"],
        "baselines": baselines,
        "against_teacher": variants.compare_with_teacher(
            predictions, rewards_NK, weights, seeds.rng(args.seed, "sign flips", name)
        ),
        "scale_check": variants.scale_check(predictions, golden_NK),
    }


def report(results):
    report_block("held-out", results)
    if results["test"]:
        report_block("test", results["test"])
    n_files = results["no_leakage"]["files_checked"]
    print(f"no held-out prompt entered a fit ({n_files} files checked)")


def report_block(name, block):
    sizes = list(block["golden_best_of_n"])
    size = sizes[min(len(sizes), 4) - 1]
    print(
        f"{name}: {block['n_prompts']} prompts x {block['n_responses']} responses; "
        "mean over prompts [95 % interval]"
    )
    tables.print_undefined(block["Teacher ORM"])
    columns = {"spearman": "Spearman", "pair_accuracy": "pair accuracy", "mse": "MSE", "r2": "R2"}
    heads = "".join(f"{head:>25}" for head in columns.values())
    print(f"{'':20}{heads}{'best of ' + size:>12}")
    rows = {variant: block[variant] for variant in variants.VARIANTS} | block["baselines"]
    for label, row in rows.items():
        cells = "".join(f"{tables.with_interval(row, column):>25}" for column in columns)
        print(f"  {label:18}{cells}{row['best_of_n'][size]:>13.3f}")
    print(f"  {'oracle':18}{'':>100}{block['golden_best_of_n'][size]:>13.3f}")
    print(f"  golden reward variance {block['golden_variance']:.3f}")
    for variant, differences in block["against_teacher"].items():
        spearman = differences["spearman"]
        if spearman["difference"] is not None:
            low, high = spearman["ci95"]
            print(
                f"  {variant} - teacher, Spearman: {spearman['difference']:+.4f} "
                f"[{low:+.4f}, {high:+.4f}], p = {spearman['p_value']:.3f}"
            )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
