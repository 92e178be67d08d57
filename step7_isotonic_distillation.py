"""Step 7: calibrate the teacher to the golden reward scale and distil it into one student MLP.

The teacher is the mean of its members, each brought to one scale. A centred isotonic map is fitted
on calibration prompts that no member trained on; where fewer than 50 are left, on out-of-bag
scores: each prompt is scored by the members that never saw it. The student learns calibrated
targets (out of fold on calibration prompts) on calibration and student-train prompts, and at as
many points interpolated between their embeddings. A second isotonic map, for the student, is fitted
on calibration prompts. Held-out prompts are not read.

Reads   what step 5 wrote to OUTPUT_DIR (or --teacher_ckpt), DATA_DIR
Writes  to OUTPUT_DIR
        distilled_rm_{task}_{objective}.ckpt   the student: state_dict, scores in reward units
        isotonic_{teacher,student}_map.joblib, isotonic_map.joblib (the teacher's), .json twins
        distillation_config.json               teacher, prompts of every fit, targets, training
        predictions_{teacher,student}_fit.npy  (n, k) scores of the responses that were fitted on
        responses_fit.npy                      (n, 1 + k) their prompt, then their numbers
        student_log.jsonl                      every epoch
Example python step7_isotonic_distillation.py --data_dir data --output_dir distill_out
"""

from pathlib import Path

import numpy as np

from rewardlib import artifacts, calibration, seeds
from rewardlib.cli import console, flags
from rewardlib.data import embeddings, splits
from rewardlib.models import model_files, scoring
from rewardlib.nets import mlp
from rewardlib.nets.student import train_student
from rewardlib.nets.training import Training
from rewardlib.pipeline import distillation, run_record

VALIDATION_SHARE = 0.1
PARTITIONS = 10


def make_parser():
    parser = console.parser(__doc__)
    flags.add_run_flags(parser)
    flags.add_distillation_flags(parser)
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    settings, chosen = flags.run_settings(args), flags.distillation_settings(args)
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        train, _ = embeddings.load_pair(args.data_dir, cache_dir=output_dir)
        split, record = run_record.open_run(output_dir, settings, train)
        teacher = distillation.open_teacher(output_dir, record, args.teacher_ckpt)
        chosen |= flags.student_settings(args, teacher.is_mlp)
        inputs = {**train.digests, **teacher.digests}
        inputs[splits.FILE] = artifacts.sha256(output_dir / splits.FILE)
        with artifacts.work(output_dir, "step7", __file__, {**settings, **chosen}, inputs) as work:
            if work is None:
                return
            config = {"settings": settings, "distillation": chosen}
            config |= calibrate_and_distil(args, chosen, work, train, split, record, teacher)
            work.write_json("distillation_config.json", config)
    report(config, output_dir)


def calibrate_and_distil(args, chosen, work, train, split, record, teacher):
    """The method of this step. Writes maps, student and scores; returns what config records."""
    fit_prompts = np.sort(np.concatenate([split["calibration"], split["student_train"]]))
    sample = draw_responses(args, train, fit_prompts)
    ensemble = open_ensemble(args, record, teacher, train, fit_prompts)
    scores_ENK, mixed_EMK = score(ensemble, sample)
    teacher_NK, mixed_MK = scores_ENK.mean(0), mixed_EMK.mean(0)
    seen_EN = teacher.seen(record, sample.prompts)
    unseen_NK = scoring.unseen_mean(scores_ENK, seen_EN)

    rewards_NK = train.rewards[sample.prompts[:, None], sample.numbers]
    golden_NK, target = distillation.make_target(rewards_NK, chosen)
    fit_on, source = distillation.calibration_prompts(sample.prompts, split, seen_EN, unseen_NK)
    teacher_map = fit_map(args, unseen_NK[fit_on], golden_NK[fit_on])
    targets_NK = distillation.apply_map(teacher_map, teacher_NK)
    targets_NK[fit_on] = out_of_fold_targets(
        args,
        train.groups[sample.prompts[fit_on]],
        unseen_NK[fit_on],
        golden_NK[fit_on],
        teacher_NK[fit_on],
    )

    targets = np.concatenate([targets_NK, distillation.apply_map(teacher_map, mixed_MK)])
    preferences = np.concatenate([teacher_NK, mixed_MK])
    student, log = distil(args, ensemble, scores_ENK, sample, targets, preferences)
    student_NK = score_student(args, student, sample)
    optimism_NK = optimism(teacher_map, teacher_NK[fit_on], unseen_NK[fit_on])
    student_map = fit_map(args, student_NK[fit_on] - optimism_NK, golden_NK[fit_on])

    student_file = save(args, work, teacher_map, student_map, student)
    work.write_jsonl("student_log.jsonl", log)
    work.write_npy("predictions_teacher_fit.npy", unseen_NK)
    work.write_npy("predictions_student_fit.npy", student_NK)
    work.write_npy("responses_fit.npy", np.column_stack([sample.prompts, sample.numbers]))
    return {
        "teacher": teacher.describe(),
        "target": target,
        "calibration": {
            "prompts": sample.prompts[fit_on],
            "scores": source,
            "increasing": distillation.is_increasing(teacher_map),
        },
        "student": describe_student(student_file, sample, log),
    }


def draw_responses(args, train, fit_prompts):
    """The responses to calibrate on and to distil, read once, with points between them."""
    prompts, numbers = distillation.sample(
        fit_prompts,
        train.shape[1],
        args.distill_responses,
        seeds.rng(args.seed, "distilled responses"),
    )
    (n, n_responses), dim = numbers.shape, train.shape[2]
    n_folds = round(1 / VALIDATION_SHARE)
    folds = splits.assign_folds(train.groups[prompts], n_folds, seeds.rng(args.seed, "student"))
    fit, held = np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)
    n_mixed = min(len(fit), args.distill_responses // n_responses - n)
    places = np.repeat(prompts, n_responses), numbers.ravel()
    n_rows, dtype = (n + n_mixed) * n_responses, flags.computing_type(args)
    rows = mlp.gather(train.read(*places), n_rows, dim, dtype)
    rows = rows.view(-1, n_responses, dim)
    distillation.interpolate(rows, fit, n_mixed, seeds.rng(args.seed, "interpolation"))
    parts = np.concatenate([fit, n + np.arange(n_mixed)]), held
    return distillation.Sample(prompts, numbers, rows, parts)


def open_ensemble(args, record, teacher, train, fit_prompts):
    """The members on one scale: that of step 5, or measured anew for external checkpoints."""
    dtype = flags.computing_type(args)
    if teacher.is_step5:
        scale = scoring.recorded_scale(record)
    else:
        scale = scoring.scale_of(teacher.paths, train, fit_prompts, dtype)
    models = model_files.Stored(teacher.paths, train.shape[2])  # one in memory at a time
    return scoring.ScaledEnsemble(models, *scale, dtype)


def score(ensemble, sample):
    """Scores of all members: (E, n, K) on the responses, (E, n_mixed, K) on the points between."""
    rows_MKD = sample.rows
    scores = scoring.score_rows(ensemble, rows_MKD.flatten(0, 1))
    scores_EMK = scores.reshape(-1, len(rows_MKD), rows_MKD.shape[1])
    return np.split(scores_EMK, [len(sample.prompts)], axis=1)


def fit_map(args, scores_NK, golden_NK):
    return calibration.make(args.isotonic).fit(scores_NK.ravel(), golden_NK.ravel())


def out_of_fold_targets(args, groups, unseen_NK, golden_NK, teacher_NK):
    """Calibrated teacher scores of the calibration prompts, by maps fitted without the prompt."""
    rng = seeds.rng(args.seed, "isotonic folds")
    folds = [splits.assign_folds(groups, args.cv_folds, rng) for _ in range(PARTITIONS)]
    return calibration.out_of_fold(args.isotonic, unseen_NK, golden_NK, folds, teacher_NK)


def distil(args, ensemble, scores_ENK, sample, targets, preferences):
    """(student, training log): an MLP that gives the targets for the embeddings of the sample."""
    n_fit, batch_size = len(sample.parts[0]), args.distill_batch_size
    epochs = distillation.passes(args.distill_epochs, args.distill_steps, n_fit, batch_size)
    seed = seeds.torch_seed(args.seed, "student start")
    return train_student(
        # as an argument alone: a variable would hold this model while the student is trained
        scoring.student_start(ensemble, scores_ENK, args.hidden, seed),
        sample.rows,
        targets,
        preferences,
        sample.parts,
        args.student_loss,
        args.ranking_lambda,
        Training(epochs, args.distill_learning_rate, batch_size),
        seeds.torch_seed(args.seed, "student"),
    )


def score_student(args, student, sample):
    """(n, K) scores of the student on the responses of the sample."""
    n, n_responses = sample.numbers.shape
    rows = sample.rows[:n].flatten(0, 1)
    scores = mlp.predict(student, rows, flags.computing_type(args))
    return scores.reshape(n, n_responses).astype(float)


def optimism(teacher_map, teacher_NK, unseen_NK):
    """By how much the calibrated teacher scores a prompt higher because members trained on it.

    The student learns the scores of the whole teacher. Had no member seen a prompt, the teacher
    would score it lower by this difference, and the student with it.
    """
    teacher_NK = distillation.apply_map(teacher_map, teacher_NK)
    return teacher_NK - distillation.apply_map(teacher_map, unseen_NK)


def save(args, work, teacher_map, student_map, student):
    """Write both maps and the student; returns the name of the student's file."""
    work.outputs += calibration.save(
        work.folder, "isotonic_teacher_map", teacher_map, aliases=["isotonic_map"]
    )
    work.outputs += calibration.save(work.folder, "isotonic_student_map", student_map)
    name = f"distilled_rm_{args.task}_{args.rm_objective}.ckpt"
    model_files.save_mlp(work.folder / name, student)
    work.outputs.append(name)
    return name


def describe_student(file, sample, log):
    best = max(entry["epoch"] for entry in log if entry["best"])
    n_responses, n_mixed = sample.numbers.shape[1], len(sample.rows) - len(sample.prompts)
    return {
        "file": file,
        "prompts": sample.prompts,
        "responses_per_prompt": n_responses,
        "interpolated_responses": n_mixed * n_responses,
        "best_epoch": best,
        "validation_r2": log[best - 1]["validation_r2"],
    }


def report(config, output_dir):
    members = config["teacher"]["members"]
    print(
        f"step7: teacher of {len(members)} members; target: golden reward, transform "
        f"{config['target']['transform']}"
    )
    if any(member["origin"] == "external" for member in members):
        print("step7: external checkpoints: this run cannot tell whether they saw held-out prompts")
    print(f"step7: isotonic maps fitted on {config['calibration']['scores']}")
    if not config["calibration"]["increasing"]:
        print(
            "step7: warning: golden rewards do not rise with the teacher's score; the calibration "
            "map is nearly constant: calibrated scores carry no information"
        )
    student = config["student"]
    print(
        f"step7: student fitted on {len(student['prompts'])} prompts x "
        f"{student['responses_per_prompt']} responses and {student['interpolated_responses']} "
        "points between them"
    )
    share = "-" if student["validation_r2"] is None else f"{student['validation_r2']:.3f}"
    print(f"step7: student explains {share} of the target variance (epoch {student['best_epoch']})")
    print(
        f"step7: wrote {student['file']} and its maps to {output_dir}; "
        "next: step8_validate_distillation.py"
    )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
