"""Step 5: train an ensemble of order-consistent reward models on noisy preference pairs.

Prompts are split once, 60 / 20 / 20, into calibration, student-train and held-out prompts. Pairs
are drawn from student-train prompts first, then from calibration prompts, never from held-out ones,
and labelled by an annotator of known noise. The prompts of the pairs form five folds; member i
validates on fold i mod 5 and trains on the others.

With --pairs FILE the pairs are recorded choices of people, split 60 / 20 / 20 into train,
calibration and held-out.

Reads   DATA_DIR/EMBD-TRAIN-split_{k}.npy, rewards_split_{k}.json; or the pairs of --pairs
Writes  to OUTPUT_DIR
        {X,Same}Prompt_mlp_{bt,clf}_{i}_....ckpt, .json   one member: state_dict, training log
        ..._{linear,lgbm,laplace,ridge}_....npz or .txt   the same of another --rm_model
        prompt_split.json                calibration, student-train and held-out prompts
        orm_....json                     prompts, folds, members, realised label error
        pairs_....npy                    (M, 5) prompt, response, prompt, response, label
        plist_....npy                    (M,) probability that the annotator prefers side 0
        reward_diff_list_....npy         (M,) golden reward of side 0 minus side 1
        training_log.jsonl               every epoch of every member
        with --pairs: HumanPairs_..., pair_split.json, orm_....json, training_log.jsonl
Example python step5_train_rms.py --data_dir data --n_sample 100 --output_dir distill_out
"""

import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rewardlib import artifacts, seeds
from rewardlib.cli import console, flags
from rewardlib.data import embeddings, pair_files, pairs, splits
from rewardlib.errors import InputError
from rewardlib.models import model_files, registry, scoring
from rewardlib.nets import mlp
from rewardlib.nets.training import Training, default_batch_size, train_ensemble
from rewardlib.pipeline import recorded, run_record


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
        train = train_on_recorded if args.pairs else train_on_drawn
        train(args, settings, output_dir)


# ----------------------------------------------------------------------------- pairs that are drawn


def train_on_drawn(args, settings, output_dir):
    """Train on pairs of DATA_DIR that an annotator of known noise labels."""
    train, _ = embeddings.load_pair(args.data_dir, cache_dir=output_dir)
    split = splits.split_prompts(train.groups, args.seed)
    settings["n_sample"] = run_record.resolve_n_sample(args.n_sample, split)
    with artifacts.work(output_dir, "step5", __file__, settings, train.digests) as work:
        if work is None:
            return
        fit_prompts = np.concatenate([split["calibration"], split["student_train"]])
        prompts = run_record.choose_prompts(
            split, settings["n_sample"], seeds.rng(args.seed, "orm prompts")
        )
        n_folds = max(2, min(run_record.FOLDS, len(prompts) // 4))
        folds = splits.assign_folds(train.groups[prompts], n_folds, seeds.rng(args.seed, "folds"))
        annotated, scale = annotate(args, train, fit_prompts, prompts, folds)
        between = pairs.between_prompt_share(train.rewards[fit_prompts])
        report_data(args, train, prompts, annotated, scale, between)
        splits.save(output_dir, split, args.seed)
        work.outputs.append(splits.FILE)

        pairs_M4 = np.stack([prompts[annotated.prompts], annotated.responses], -1).reshape(-1, 4)
        training, ratings = training_rows(args, train, annotated, pairs_M4, n_folds)
        members, log = train_members(args, settings, work, training, ratings)

        paths = [output_dir / member["file"] for member in members]
        centre, spread = scoring.scale_of(paths, train, fit_prompts, flags.computing_type(args))
        stem = run_record.stem(settings)
        pairs_M5 = np.column_stack([pairs_M4, annotated.labels]).astype(np.int32)
        work.write_npy(f"pairs_{stem}.npy", pairs_M5)
        work.write_npy(f"plist_{stem}.npy", annotated.probability)
        work.write_npy(f"reward_diff_list_{stem}.npy", annotated.reward_diff)
        save_record(
            work,
            log,
            {
                "settings": settings,
                "prompts": prompts,
                "folds": folds,
                "members": members,
                "scale": {"centre": centre, "spread": spread},
                "pairs": describe_labels(args, annotated, scale, between),
            },
        )
    report_members(log, output_dir, work.notes["record"])


def annotate(args, train, fit_prompts, prompts, folds):
    """Pairs drawn within folds, with noisy labels; and the reward scale of the noise."""
    scale = args.reward_scale or train.rewards[fit_prompts].std() or 1.0
    annotated = pairs.build(
        train.rewards[prompts],
        folds,
        pairing=args.pairing,
        consider_first_n=args.consider_first_n,
        n_pairs=args.n_pairs,
        quality=args.annotation_quality,
        scale=scale,
        rng=seeds.rng(args.seed, "pairs"),
    )
    return annotated, scale


def training_rows(args, train, annotated, pairs_M4, n_folds):
    """The pairs with the embeddings they compare, each read once; and golden rewards, for ridge."""
    rows_read, index = pairs.rows_of(pairs_M4, train.shape[1])
    if args.rm_model == "mlp":
        n_rows, dtype = len(rows_read[0]), flags.computing_type(args)
        rows = mlp.gather(train.read(*rows_read), n_rows, train.shape[2], dtype)
    else:
        rows = train.take(*rows_read)
    ratings = train.rewards[rows_read] if args.rm_objective == "regression" else None
    training = recorded.TrainingPairs(
        rows, index, annotated.labels, annotated.prompts, annotated.folds, n_folds
    )
    return training, ratings


def describe_labels(args, annotated, scale, between):
    return {
        "n": len(annotated.labels),
        "n_equal_rewards_left_out": annotated.n_equal,
        "label_error": annotated.label_error,
        "expected_label_error": float(
            np.minimum(annotated.probability, 1 - annotated.probability).mean()
        ),
        "annotation_quality": args.annotation_quality,
        "reward_scale": float(scale),
        "between_prompt_share": between,
    }


# ----------------------------------------------------------------------- pairs that people recorded


def train_on_recorded(args, settings, output_dir):
    """Train on the train part of the pairs of --pairs."""
    if args.rm_objective == "regression":
        raise InputError(
            "rm_objective regression: expected golden rewards, found --pairs; choose bt or clf"
        )
    data = pair_files.load(args.pairs)
    settings = recorded.run_settings(settings, data)
    with artifacts.work(output_dir, "step5", __file__, settings, data.responses.digests) as work:
        if work is None:
            return
        roles = recorded.split(data, args.seed)
        dtype = flags.computing_type(args) if args.rm_model == "mlp" else None
        training = recorded.draw(data, roles["train"], args.seed, dtype)
        for line in pair_files.describe(data.about):
            print(f"step5: {line}")
        sizes = ", ".join(f"{len(rows)} {role}" for role, rows in roles.items())
        print(f"step5: {sizes} pairs; training on {len(training.labels)}, ties left out")
        recorded.save_split(output_dir, roles, args.seed)
        work.outputs.append(recorded.SPLIT_FILE)
        members, log = train_members(args, settings, work, training)
        save_record(
            work,
            log,
            {
                "settings": settings,
                "prompts": training.prompts[:, 0],
                "folds": training.folds,
                "members": members,
                "pairs": {**data.about, "n_trained_on": len(training.labels)},
            },
        )
    report_members(log, output_dir, work.notes["record"])


# ------------------------------------------------------------------------------------------ members


def train_members(args, settings, work, training, ratings=None):
    """Train the members that are not finished, each with a manifest entry of its own.

    training: recorded.TrainingPairs; ratings: (R,) golden rewards of its rows, for models that
    learn from these. Returns the members, and the epochs of all of them with their member number.
    """
    identities, jobs = {}, []
    for member in range(args.ensemble_number):
        name = run_record.stem(settings, member)
        arguments = {key: value for key, value in settings.items() if key != "ensemble_number"}
        identity = artifacts.identity(
            __file__, {**arguments, "member": member}, work.identity["inputs"]
        )
        if not artifacts.is_finished(work.folder, name, identity):
            identities[member] = identity
            jobs.append(job_of(args, settings, training, member))
    started = time.time()
    with tqdm(total=len(jobs), desc="members", disable=None) as bar:
        trained = iter(fit(args, training, jobs, ratings))
        # Neither zip nor tqdm goes through the models: they would hold a model in memory while the
        # next one is trained.
        for member, identity in identities.items():
            model, log = next(trained)
            save_member(settings, work, member, identity, model, log, training.n_folds, started)
            del model
            bar.update()
            started = time.time()
    names = [run_record.stem(settings, member) for member in range(args.ensemble_number)]
    records = [artifacts.read_json(work.folder / f"{name}.json", "step 5") for name in names]
    work.outputs += [record["file"] for record in records]
    log = [{"member": record["member"], **epoch} for record in records for epoch in record["log"]]
    members = [{key: value for key, value in r.items() if key != "log"} for r in records]
    return members, log


def job_of(args, settings, training, member):
    """(train pairs, validation pairs, seed) of one member."""
    is_held = training.folds == member % training.n_folds
    train_pairs = np.flatnonzero(~is_held)
    if len(train_pairs) < 2:
        raise InputError(
            "pairs: expected at least 2 of different reward outside every fold, found "
            f"{len(train_pairs)}; add prompts"
        )
    if settings["replacement"]:
        rng = seeds.rng(args.seed, "bootstrap", member)
        train_pairs = train_pairs[pairs.bootstrap(training.prompts[train_pairs, 0], rng)]
    return train_pairs, np.flatnonzero(is_held), seeds.torch_seed(args.seed, "member", member)


def fit(args, training, jobs, ratings):
    """Yield (model, training log) of every job."""
    rows, index, labels = training.rows, training.index, training.labels
    if args.rm_model != "mlp":
        kind = registry.model_class(args.rm_model, args.rm_objective)
        return registry.fit_members(kind, rows, index, labels, training.folds, jobs, ratings)
    print(f"step5: computing in {flags.computing_name(args)} on {torch.get_num_threads()} threads")
    n_train = len(labels) * (training.n_folds - 1) // training.n_folds
    batch_size = args.batch_size or default_batch_size(n_train)
    loop = Training(args.training_epochs, args.learning_rate, batch_size)
    return train_ensemble(rows, index, labels, jobs, args.rm_objective, loop, args.hidden)


def save_member(settings, work, member, identity, model, log, n_folds, started):
    name = run_record.stem(settings, member)
    path = model_files.save(work.folder / name, model)
    record = {
        "member": member,
        "file": path.name,
        "validation_fold": member % n_folds,
        "best_epoch": max(entry["epoch"] for entry in log if entry["best"]),
        "log": log,
    }
    artifacts.write_json(work.folder / f"{name}.json", record)
    artifacts.record(work.folder, name, identity, [path.name, f"{name}.json"], started)


def save_record(work, log, record):
    work.notes["record"] = f"orm_{run_record.stem(record['settings'])}.json"
    work.write_jsonl("training_log.jsonl", log)
    work.write_json(work.notes["record"], record)


# ------------------------------------------------------------------------------------------- report


def report_data(args, train, prompts, annotated, scale, between):
    n, k, d = train.shape
    print(f"step5: {n} prompts x {k} responses x {d} dimensions from {args.data_dir}")
    print(f"step5: {between:.0%} of the reward variance lies between prompts")
    print(
        f"step5: {len(annotated.labels)} {args.pairing} pairs on {len(prompts)} prompts; "
        f"{annotated.n_equal} of equal reward left out; label error {annotated.label_error:.3f} "
        f"(quality {args.annotation_quality:g}, scale {scale:.4g})"
    )


def report_members(log, output_dir, record_name):
    print("member  best epoch  validation loss  validation accuracy")
    best = {epoch["member"]: epoch for epoch in log if epoch["best"]}  # the last one that was best
    for member, epoch in best.items():
        loss = epoch.get("validation_loss", np.nan)
        accuracy = epoch.get("validation_accuracy", np.nan)
        print(f"{member:6d}  {epoch['epoch']:10d}  {loss:15.4f}  {accuracy:19.3f}")
    print(
        f"step5: wrote {len(best)} members and {record_name} to {output_dir}; "
        "next: step6_eval_rms.py"
    )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
