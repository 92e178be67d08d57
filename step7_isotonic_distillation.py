"""Step 7: calibrate the teacher to the golden reward scale and distil it into one student MLP.

The teacher is the mean of its members, each brought to one scale. A centred isotonic map is fitted
on calibration prompts that no member trained on; where fewer than 50 are left, on out-of-bag
scores: each prompt by the members that never saw it. The student learns calibrated targets (out of
fold on calibration prompts) on calibration and student-train prompts, and at as many points between
their embeddings; its own map is fitted on calibration prompts. Held-out prompts are not read.

Reads   what step 5 wrote to OUTPUT_DIR (or --teacher_ckpt), DATA_DIR
Writes  OUTPUT_DIR/distilled_rm_{task}_{objective}.ckpt  the student: plain state_dict, scores in golden reward units
        OUTPUT_DIR/isotonic_{teacher,student}_map.joblib, isotonic_map.joblib, each with a .json of the same numbers
        OUTPUT_DIR/distillation_config.json              teacher, prompts of every fit, targets, training
        OUTPUT_DIR/predictions_{teacher,student}_fit.npy (n, k) scores of the responses that were fitted on
        OUTPUT_DIR/responses_fit.npy                     (n, 1 + k) their prompt, then their numbers
        OUTPUT_DIR/student_log.jsonl                     every epoch
Example python step7_isotonic_distillation.py --data_dir data --distill_epochs 20 --output_dir distill_out
"""

import time
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


def parse_args(argv=None):
    parser = console.parser(__doc__)
    flags.add_run_flags(parser)
    flags.add_distillation_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    settings = flags.run_settings(args)
    chosen = flags.distillation_settings(args)
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        train, _ = embeddings.load_pair(args.data_dir, cache_dir=output_dir)
        split, record = run_record.open_run(output_dir, settings, train)
        members = {(output_dir / m["file"]).resolve(): i for i, m in enumerate(record["members"])}
        paths = (
            model_files.find_checkpoints(args.teacher_ckpt) if args.teacher_ckpt else list(members)
        )
        paths = [path.resolve() for path in paths]
        home = output_dir.resolve()
        digests = {
            str(p.relative_to(home) if home in p.parents else p): artifacts.sha256(p) for p in paths
        }
        inputs = {
            **train.digests,
            **digests,
            splits.FILE: artifacts.sha256(output_dir / splits.FILE),
        }
        work = artifacts.identity(__file__, {**settings, **chosen}, inputs)
        if artifacts.is_finished(output_dir, "step7", work):
            print(f"step7: already done in {output_dir} (FORCE=1 redoes it)")
            return
        started = time.time()

        fit_prompts = np.sort(np.concatenate([split["calibration"], split["student_train"]]))
        prompts, numbers = distillation.sample(
            fit_prompts,
            train.shape[1],
            args.distill_responses,
            seeds.rng(args.seed, "distilled responses"),
        )
        n, n_responses, dim = *numbers.shape, train.shape[2]
        dtype = mlp.TYPES[settings["precision"]]
        if paths == list(members):
            scale = scoring.recorded_scale(record)
        else:
            scale = scoring.scale_of(paths, train, fit_prompts, dtype)
        ensemble = scoring.Ensemble(model_files.Stored(paths, dim), *scale, dtype)
        index = [members.get(path) for path in paths]
        seen = run_record.seen_by_members(record, prompts)
        seen = np.stack([seen[i] if i is not None else np.zeros(len(prompts), bool) for i in index])
        dealt = splits.assign_folds(
            train.groups[prompts], round(1 / VALIDATION_SHARE), seeds.rng(args.seed, "student")
        )
        fit, held = np.flatnonzero(dealt != 0), np.flatnonzero(dealt == 0)
        n_mixed = min(len(fit), args.distill_responses // n_responses - n)

        places = np.repeat(prompts, n_responses), numbers.ravel()
        rows = mlp.gather(train.read(*places), (n + n_mixed) * n_responses, dim, dtype)
        distillation.interpolate(
            rows.view(-1, n_responses, dim), fit, n_mixed, seeds.rng(args.seed, "interpolation")
        )
        scores, mixed = np.split(
            scoring.score_rows(ensemble, rows).reshape(-1, n + n_mixed, n_responses), [n], 1
        )
        teacher, unseen = scores.mean(0), scoring.unseen_mean(scores, seen)

        golden, target = distillation.make_target(train.rewards[prompts[:, None], numbers], chosen)
        fit_on, source = distillation.calibration_prompts(prompts, split, seen, unseen)
        rng, groups = seeds.rng(args.seed, "isotonic folds"), train.groups[prompts[fit_on]]
        folds = [splits.assign_folds(groups, args.cv_folds, rng) for _ in range(PARTITIONS)]
        teacher_map = calibration.make(args.isotonic).fit(
            unseen[fit_on].ravel(), golden[fit_on].ravel()
        )
        calibrated = teacher_map.predict(teacher.ravel()).reshape(teacher.shape)
        targets = calibrated.copy()
        targets[fit_on] = calibration.out_of_fold(
            args.isotonic, unseen[fit_on], golden[fit_on], folds, teacher[fit_on]
        )

        batch_size, n_fit = args.distill_batch_size, len(fit) + n_mixed
        epochs = distillation.passes(args.distill_epochs, args.distill_steps, n_fit, batch_size)
        student, log = train_student(
            scoring.student_start(
                ensemble, scores, args.hidden, seeds.torch_seed(args.seed, "student start")
            ),
            rows.view(-1, n_responses, dim),
            np.concatenate(
                [targets, teacher_map.predict(mixed.mean(0).ravel()).reshape(-1, n_responses)]
            ),
            np.concatenate([teacher, mixed.mean(0)]),
            (np.concatenate([fit, n + np.arange(n_mixed)]), held),
            args.student_loss,
            args.ranking_lambda,
            Training(epochs, args.distill_learning_rate, batch_size),
            seeds.torch_seed(args.seed, "student"),
        )
        student_scores = (
            mlp.predict(student, rows[: n * n_responses], dtype).reshape(n, -1).astype(float)
        )
        # Had the teacher not seen these prompts, its calibrated score would differ by this, the
        # student's with it.
        optimism = calibrated[fit_on] - teacher_map.predict(unseen[fit_on].ravel()).reshape(
            -1, n_responses
        )
        clean = student_scores[fit_on] - optimism
        student_map = calibration.make(args.isotonic).fit(clean.ravel(), golden[fit_on].ravel())

        outputs = calibration.save(
            output_dir, "isotonic_teacher_map", teacher_map, aliases=["isotonic_map"]
        )
        outputs += calibration.save(output_dir, "isotonic_student_map", student_map)
        outputs += [f"distilled_rm_{args.task}_{args.rm_objective}.ckpt", "student_log.jsonl"]
        model_files.save_mlp(output_dir / outputs[-2], student)
        artifacts.write_jsonl(output_dir / outputs[-1], log)
        arrays = {
            "predictions_teacher_fit.npy": unseen,
            "predictions_student_fit.npy": student_scores,
        }
        for name, array in (
            arrays | {"responses_fit.npy": np.column_stack([prompts, numbers])}
        ).items():
            outputs.append(name)
            artifacts.write_npy(output_dir / name, array)
        best = max(entry["epoch"] for entry in log if entry["best"])
        config = {
            "settings": settings,
            "distillation": chosen,
            "teacher": {
                "members": [
                    {
                        "file": name,
                        "sha256": digests[name],
                        "origin": "external" if i is None else "step5",
                    }
                    for name, i in zip(digests, index, strict=True)
                ],
                "aggregation": "mean of member scores, each with mean 0 and sd 1 over a sample of the fit prompts",
            },
            "target": target,
            "calibration": {
                "prompts": prompts[fit_on],
                "scores": source,
                "increasing": distillation.is_increasing(teacher_map),
            },
            "student": {
                "file": f"distilled_rm_{args.task}_{args.rm_objective}.ckpt",
                "prompts": prompts,
                "responses_per_prompt": n_responses,
                "interpolated_responses": n_mixed * n_responses,
                "best_epoch": best,
                "validation_r2": log[best - 1]["validation_r2"],
            },
        }
        artifacts.write_json(output_dir / "distillation_config.json", config)
        artifacts.record(output_dir, "step7", work, [*outputs, "distillation_config.json"], started)
        report(config, target, output_dir)


def report(config, target, output_dir):
    members = config["teacher"]["members"]
    print(
        f"step7: teacher of {len(members)} members; target: golden reward, transform {target['transform']}"
    )
    if any(member["origin"] == "external" for member in members):
        print(
            "step7: external checkpoints: whether they saw held-out prompts cannot be told from here"
        )
    print(f"step7: isotonic maps fitted on {config['calibration']['scores']}")
    if not config["calibration"]["increasing"]:
        print(
            "step7: warning: golden rewards do not rise with the teacher's score; the map is all but constant"
        )
    student = config["student"]
    print(
        f"step7: student fitted on {len(student['prompts'])} prompts x {student['responses_per_prompt']} responses and "
        f"{student['interpolated_responses']} points between them"
    )
    share = "-" if student["validation_r2"] is None else f"{student['validation_r2']:.3f}"
    print(f"step7: student explains {share} of the target variance (epoch {student['best_epoch']})")
    print(
        f"step7: wrote {student['file']} and its maps to {output_dir}; next: step8_validate_distillation.py"
    )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
