"""Step 3.5: join the parts into one record per (prompt, response), in generation order, ranked within its prompt.

Refuses missing parts, another K, rewards of other texts. The rank is a column: nothing is sorted by
it.

Reads   GEN_DIR/{prompts}_{model}_{adapter}/{train,test}-part_{0-4}/responses.jsonl and rewards_{rm}.jsonl
Writes  GEN_DIR/{prompts}_{model}_{adapter}/records_{rm}_{train,test}.jsonl   id, k, query, response, reward, rank, text
Example python step3.5_processing_data.py --task helpful --gen_pref_model_name gemma2b --data_class train
"""

import time
from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.cli import console, flags, kinds
from rewardlib.errors import InputError
from rewardlib.llm import responses


def parse_args(argv=None):
    parser = console.parser(__doc__)
    flags.add_generated_flags(parser)
    parser.add_argument(
        "--data_class", choices=("train", "test"), default="train", help="which prompts"
    )
    parser.add_argument(
        "--n_samples", type=kinds.count, help="expected responses per prompt; None: as step 2 made"
    )
    parser.add_argument("--gen_dir", default="gen_data", help="OUTPUT_DIR of step 2")
    return flags.name_sources(parser.parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    folder = responses.run_folder(
        args.gen_dir, args.eval_dataset, args.gen_pref_model_name, args.adapter_name, args.dataset
    )
    rm = responses.label(args.reward_model)
    parts = [
        responses.part_folder(folder, args.data_class, part) for part in range(responses.PARTS)
    ]
    n_samples, about, inputs = check_parts(args, parts, rm)
    work = responses.work_of({"n_samples": n_samples}, inputs)
    name, entry = f"records_{rm}_{args.data_class}.jsonl", f"step3.5 {rm} {args.data_class}"
    with artifacts.lock(folder):
        if artifacts.is_finished(folder, entry, work):
            print(f"step3.5: already done in {folder} (FORCE=1 redoes it)")
            return
        started, seen, rewards, empty = time.time(), {}, [], 0

        def records():
            nonlocal empty
            for part in parts:
                for record in responses.join(part, rm):
                    if record["k"] == 0 and seen.setdefault(record["id"], part) != part:
                        raise InputError(
                            f"{part}: expected each prompt in one part, found {record['id']} in two"
                        )
                    rewards.append(record["reward"])
                    empty += not record["response"].strip()
                    yield record
            if len(seen) != about["n_kept"]:
                raise InputError(
                    f"{folder}: expected {about['n_kept']} prompts, found {len(seen)}; run step 2 again"
                )

        artifacts.write_jsonl(folder / name, records())
        artifacts.record(folder, entry, work, [name], started)
    by_prompt = np.array(rewards).reshape(-1, n_samples)
    print(
        f"step3.5: {len(seen)} {args.data_class} prompts x {n_samples} responses ({len(about['dropped'])} prompts were "
        f"dropped in step 2, {empty} responses are empty); reward mean {by_prompt.mean():.4f}, "
        f"sd within prompts {by_prompt.std(axis=1).mean():.4f}"
    )
    print(f"step3.5: wrote {folder / name}; next: step4_gen_embeddings.py")


def check_parts(args, parts, rm):
    """(K, record of the prompts, {part: digests}) of parts that are all there and agree."""
    found, abouts, inputs = {}, [], {}
    for part in parts:
        told = responses.finished(
            part, "step2", ["prompts.json"], f"step2_gen_sample.py --split {part.name[-1]}"
        )
        scored = responses.finished(
            part, f"step3 {rm}", [], f"step3_reward_annotation.py --split {part.name[-1]}"
        )
        settings = {key: value for key, value in told["arguments"].items() if key != "n_samples"}
        source = {key: value for key, value in told["inputs"].items() if key != "prompts"}
        found[part.name] = (
            told["arguments"]["n_samples"],
            settings,
            source,
            scored["arguments"],
            _scorer(scored),
        )
        abouts.append(artifacts.read_json(part / "prompts.json", "step 2"))
        inputs[part.name] = [told["outputs"]["responses.jsonl"]["sha256"], scored["hash"]]
    first = parts[0].name
    for name, told in found.items():
        what = ("K", "sampling settings", "generator", "scoring settings", "reward model")
        for word, expected, value in zip(what, found[first], told, strict=True):
            if value != expected:
                raise InputError(
                    f"{parts[0].parent / name}: expected the {word} of {first} ({str(expected)[:80]}), found "
                    f"{str(value)[:80]}; run that part again with the same settings"
                )
    if any(about != abouts[0] for about in abouts):
        raise InputError(
            f"{parts[0].parent}: expected parts of one set of prompts, found several; run step 2 again"
        )
    if args.n_samples and args.n_samples != found[first][0]:
        raise InputError(
            f"{parts[0]}: expected {args.n_samples} responses a prompt, found {found[first][0]}; run step 2 again or "
            "change --n_samples"
        )
    return found[first][0], abouts[0], inputs


def _scorer(entry):
    return entry["inputs"]["reward_model"]


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
