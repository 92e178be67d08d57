"""Step 5: train an ensemble of order-consistent reward models on noisy preference pairs.

Prompts are split once, 60 / 20 / 20, into calibration, student-train and held-out prompts. Pairs
are drawn from student-train prompts first, then from calibration prompts, never from held-out ones,
and labelled by an annotator of known noise. The prompts of the pairs form five folds; member i
validates on fold i mod 5 and trains on the others.

With --pairs FILE the pairs are recorded choices of people: split 60 / 20 / 20 into train,
calibration and held-out.

Reads   DATA_DIR/EMBD-TRAIN-split_{k}.npy, rewards_split_{k}.json; or the pairs of --pairs
Writes  OUTPUT_DIR/{X,Same}Prompt_mlp_{bt|clf}_{i}_....ckpt and .json   one member: plain state_dict, its training log
        OUTPUT_DIR/prompt_split.json                                    who is calibration, student-train, held-out
        OUTPUT_DIR/orm_....json                                         prompts, folds, members, realised label error
        OUTPUT_DIR/pairs_....npy                                        (M, 5) prompt, response, prompt, response, label
        OUTPUT_DIR/plist_....npy, reward_diff_list_....npy              (M,) annotator's probability, golden difference
        OUTPUT_DIR/training_log.jsonl                                   every epoch of every member
        --rm_model other than mlp: ..._{linear,lgbm,laplace,ridge}_{objective}_{i}_....npz or .txt (trees)
        --pairs: HumanPairs_..., pair_split.json, orm_....json, training_log.jsonl
Example python step5_train_rms.py --data_dir data --n_sample 100 --rm_objective bt --output_dir distill_out
"""

import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rewardlib import artifacts, seeds
from rewardlib.cli import console, flags
from rewardlib.data import embeddings, pair_files, pairs, splits
from rewardlib.errors import InputError
from rewardlib.models import model_files, registry, scoring
from rewardlib.nets import mlp
from rewardlib.nets.training import Training, default_batch_size, train_ensemble
from rewardlib.pipeline import recorded, run_record


def parse_args(argv=None):
    parser = console.parser(__doc__)
    flags.add_run_flags(parser)
    flags.add_pairs_flag(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    settings = flags.run_settings(args)
    dtype = mlp.TYPES[settings["precision"]]
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        if args.pairs:
            return train_on_recorded(args, settings, output_dir)
        train, _ = embeddings.load_pair(args.data_dir, cache_dir=output_dir)
        split = splits.split_prompts(train.groups, args.seed)
        settings["n_sample"] = run_record.resolve_n_sample(args.n_sample, split)
        work = artifacts.identity(__file__, settings, train.digests)
        if artifacts.is_finished(output_dir, "step5", work):
            print(f"step5: already done in {output_dir} (FORCE=1 redoes it)")
            return
        for change in artifacts.describe_change(output_dir, "step5", work):
            print(f"step5: replacing earlier reward models: {change}")
        started = time.time()

        prompts = run_record.choose_prompts(
            split, settings["n_sample"], seeds.rng(args.seed, "orm prompts")
        )
        n_folds = max(2, min(run_record.FOLDS, len(prompts) // 4))
        folds = splits.assign_folds(train.groups[prompts], n_folds, seeds.rng(args.seed, "folds"))
        fit_prompts = np.concatenate([split["calibration"], split["student_train"]])
        reward_scale = args.reward_scale or train.rewards[fit_prompts].std() or 1.0
        drawn = pairs.build(
            train.rewards[prompts],
            folds,
            pairing=args.pairing,
            consider_first_n=args.consider_first_n,
            n_pairs=args.n_pairs,
            quality=args.annotation_quality,
            scale=reward_scale,
            rng=seeds.rng(args.seed, "pairs"),
        )
        between = pairs.between_prompt_share(train.rewards[fit_prompts])
        report_data(args, train, prompts, drawn, reward_scale, between)
        splits.save(output_dir, split, args.seed)

        flat = prompts[drawn.prompts] * train.shape[1] + drawn.responses
        touched, index = np.unique(flat, return_inverse=True)
        places = touched // train.shape[1], touched % train.shape[1]
        if args.rm_model == "mlp":
            rows = mlp.gather(train.read(*places), len(touched), train.shape[2], dtype)
        else:
            rows = train.take(*places)
        ratings = train.rewards[places] if args.rm_objective == "regression" else None
        records = train_members(
            args, settings, work, drawn, rows, index.reshape(-1, 2), n_folds, output_dir, ratings
        )

        stem = run_record.stem(settings, settings["n_sample"])
        centre, spread = scoring.scale_of(
            [output_dir / r["file"] for r in records], train, fit_prompts, dtype
        )
        sides = np.stack([prompts[drawn.prompts], drawn.responses], -1).reshape(-1, 4)
        arrays = {
            f"pairs_{stem}.npy": np.column_stack([sides, drawn.labels]).astype(np.int32),
            f"plist_{stem}.npy": drawn.probability,
            f"reward_diff_list_{stem}.npy": drawn.reward_diff,
        }
        for name, array in arrays.items():
            artifacts.write_npy(output_dir / name, array)
        log = [{"member": r["member"], **epoch} for r in records for epoch in r["log"]]
        artifacts.write_jsonl(output_dir / "training_log.jsonl", log)
        record = {
            "settings": settings,
            "prompts": prompts,
            "folds": folds,
            "members": [{key: value for key, value in r.items() if key != "log"} for r in records],
            "scale": {"centre": centre, "spread": spread},
            "pairs": {
                "n": len(drawn.labels),
                "n_equal_rewards_left_out": drawn.n_equal,
                "label_error": drawn.label_error,
                "expected_label_error": float(
                    np.minimum(drawn.probability, 1 - drawn.probability).mean()
                ),
                "annotation_quality": args.annotation_quality,
                "reward_scale": float(reward_scale),
                "between_prompt_share": between,
            },
        }
        record_name = f"orm_{stem}.json"
        artifacts.write_json(output_dir / record_name, record)
        outputs = [
            *arrays,
            "training_log.jsonl",
            record_name,
            splits.FILE,
            *(r["file"] for r in records),
        ]
        artifacts.record(output_dir, "step5", {**work, "record": record_name}, outputs, started)
        report_members(records, output_dir, record_name)


def train_members(args, settings, work, drawn, rows, index, n_folds, output_dir, ratings=None):
    """Train the members that are not finished yet, one manifest entry each. Returns all records, in order.

    ratings: golden rewards of `rows`, for the models that learn from them.
    """
    todo, jobs = [], []
    member_settings = {key: value for key, value in settings.items() if key != "ensemble_number"}
    for member in range(args.ensemble_number):
        name = run_record.stem(settings, settings["n_sample"], member)
        member_work = artifacts.identity(
            __file__, {**member_settings, "member": member}, work["inputs"]
        )
        if artifacts.is_finished(output_dir, name, member_work):
            continue
        held = drawn.folds == member % n_folds
        chosen = np.flatnonzero(~held)
        if len(chosen) < 2:
            raise InputError(
                f"pairs: expected at least 2 of different reward outside every fold, found {len(chosen)}; add prompts"
            )
        if settings["replacement"]:
            rng = seeds.rng(args.seed, "bootstrap", member)
            chosen = chosen[pairs.bootstrap(drawn.prompts[chosen, 0], rng)]
        todo.append((member, name, member_work))
        jobs.append((chosen, np.flatnonzero(held), seeds.torch_seed(args.seed, "member", member)))
    batch_size = args.batch_size or default_batch_size(len(drawn.labels) * (n_folds - 1) // n_folds)
    training = Training(args.training_epochs, args.learning_rate, batch_size)
    if args.rm_model == "mlp":
        print(
            f"step5: computing in {settings['precision']} on {mlp.torch.get_num_threads()} threads"
        )
        trained = train_ensemble(
            rows, index, drawn.labels, jobs, args.rm_objective, training, args.hidden
        )
    else:
        kind = registry.model_class(args.rm_model, args.rm_objective)
        trained = registry.fit_members(kind, rows, index, drawn.labels, drawn.folds, jobs, ratings)
    waiting, started = iter(todo), time.time()
    with tqdm(total=len(todo), desc="members", disable=None) as bar:
        for (
            model,
            log,
        ) in trained:  # neither zip nor tqdm: they would hold a model while the next one is trained
            member, name, member_work = next(waiting)
            path = model_files.save(output_dir / name, model)
            del model
            best = max(entry["epoch"] for entry in log if entry["best"])
            about = {
                "member": member,
                "file": path.name,
                "validation_fold": member % n_folds,
                "best_epoch": best,
                "log": log,
            }
            artifacts.write_json(output_dir / f"{name}.json", about)
            artifacts.record(output_dir, name, member_work, [path.name, f"{name}.json"], started)
            bar.update()
            started = time.time()
    stems = [
        run_record.stem(settings, settings["n_sample"], member)
        for member in range(args.ensemble_number)
    ]
    return [artifacts.read_json(output_dir / f"{name}.json", "step 5") for name in stems]


def train_on_recorded(args, settings, output_dir):
    """Train members on the train pairs of --pairs."""

    if args.rm_objective == "regression":
        raise InputError(
            "rm_objective regression: expected golden rewards, found --pairs; choose bt or clf"
        )
    data = pair_files.load(args.pairs)
    settings = recorded.run_settings(settings, data)
    work = artifacts.identity(__file__, settings, data.responses.digests)
    if artifacts.is_finished(output_dir, "step5", work):
        print(f"step5: already done in {output_dir} (FORCE=1 redoes it)")
        return
    for change in artifacts.describe_change(output_dir, "step5", work):
        print(f"step5: replacing earlier reward models: {change}")
    started = time.time()
    roles = recorded.split(data, args.seed)
    dtype = mlp.TYPES[settings["precision"]] if args.rm_model == "mlp" else None
    drawn = recorded.draw(data, roles["train"], args.seed, dtype)
    for line in pair_files.describe(data.about):
        print(f"step5: {line}")
    sizes = ", ".join(f"{len(rows)} {role}" for role, rows in roles.items())
    print(f"step5: {sizes} pairs; training on {len(drawn.labels)}, ties left out")
    recorded.save_split(output_dir, roles, args.seed)
    records = train_members(
        args, settings, work, drawn, drawn.rows, drawn.index, drawn.n_folds, output_dir
    )
    log = [{"member": r["member"], **epoch} for r in records for epoch in r["log"]]
    artifacts.write_jsonl(output_dir / "training_log.jsonl", log)
    record = {
        "settings": settings,
        "prompts": drawn.prompts[:, 0],
        "folds": drawn.folds,
        "members": [{key: value for key, value in r.items() if key != "log"} for r in records],
        "pairs": {**data.about, "n_trained_on": len(drawn.labels)},
    }
    name = f"orm_{run_record.stem(settings, len(data))}.json"
    artifacts.write_json(output_dir / name, record)
    outputs = ["training_log.jsonl", name, recorded.SPLIT_FILE, *(r["file"] for r in records)]
    artifacts.record(output_dir, "step5", {**work, "record": name}, outputs, started)
    report_members(records, output_dir, name)


def report_data(args, train, prompts, drawn, reward_scale, between):
    n, k, d = train.shape
    print(f"step5: {n} prompts x {k} responses x {d} dimensions from {args.data_dir}")
    print(f"step5: {between:.0%} of the reward variance lies between prompts")
    print(
        f"step5: {len(drawn.labels)} {args.pairing} pairs on {len(prompts)} prompts; {drawn.n_equal} of equal reward "
        f"left out; label error {drawn.label_error:.3f} (quality {args.annotation_quality:g}, scale {reward_scale:.4g})"
    )


def report_members(records, output_dir, record_name):
    print("member  best epoch  validation loss  validation accuracy")
    for r in records:
        best = r["log"][r["best_epoch"] - 1]
        loss, accuracy = (
            best.get("validation_loss", np.nan),
            best.get("validation_accuracy", np.nan),
        )
        print(f"{r['member']:6d}  {r['best_epoch']:10d}  {loss:15.4f}  {accuracy:19.3f}")
    print(
        f"step5: wrote {len(records)} members and {record_name} to {output_dir}; next: step6_eval_rms.py"
    )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
