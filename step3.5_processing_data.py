"""Step 3.5: join the parts into one record per prompt and response, ranked within its prompt.

Records are in generation order; the rank is a column, by which nothing is sorted. Missing parts,
parts of another K and rewards of other texts are refused.

Reads   GEN_DIR/{prompts}_{model}_{adapter}/{train,test}-part_{0-4}/
        responses.jsonl and rewards_{rm}.jsonl
Writes  GEN_DIR/{prompts}_{model}_{adapter}/records_{rm}_{train,test}.jsonl
        id, k, query, response, reward, rank, text
Example python step3.5_processing_data.py --task helpful --gen_pref_model_name gemma2b
"""

from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.cli import console, flags, kinds
from rewardlib.errors import InputError
from rewardlib.llm import responses


def make_parser():
    parser = console.parser(__doc__)
    flags.add_generated_flags(parser)
    flags.add_data_class_flag(parser)
    parser.add_argument(
        "--n_samples",
        type=kinds.count,
        help="expected number of responses per prompt; None: as many as step 2 sampled",
    )
    return parser


def parse_args(argv=None):
    return flags.name_sources(make_parser().parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    folder = responses.run_folder(
        args.gen_dir, args.eval_dataset, args.gen_pref_model_name, args.adapter_name, args.dataset
    )
    rm = responses.label(args.reward_model)
    part_dirs = [
        responses.part_folder(folder, args.data_class, part) for part in range(responses.PARTS)
    ]
    n_samples, about, inputs = check_parts(args, part_dirs, rm)
    name = f"records_{rm}_{args.data_class}.jsonl"
    entry, settings = f"step3.5 {rm} {args.data_class}", {"n_samples": n_samples}
    with (
        artifacts.lock(folder),
        artifacts.work(folder, entry, None, settings, inputs) as work,
    ):
        if work is None:
            return
        records = Joined(part_dirs, rm)
        work.write_jsonl(name, records.of(about["n_kept"]))
    rewards_NK = np.array(records.rewards).reshape(-1, n_samples)
    print(
        f"step3.5: {len(rewards_NK)} {args.data_class} prompts x {n_samples} responses "
        f"({len(about['dropped'])} prompts were dropped in step 2, {records.n_empty} responses are "
        f"empty); reward mean {rewards_NK.mean():.4f}, "
        f"sd within prompts {rewards_NK.std(axis=1).mean():.4f}"
    )
    print(f"step3.5: wrote {folder / name}; next: step4_gen_embeddings.py")


class Joined:
    """The records of all parts, one after another, and the counts that are printed afterwards."""

    def __init__(self, part_dirs, rm):
        self.part_dirs, self.rm = part_dirs, rm
        self.rewards, self.n_empty = [], 0

    def of(self, n_prompts):
        """Yield all records; InputError unless they have `n_prompts` prompts, each in one part."""
        part_of = {}
        for part_dir in self.part_dirs:
            for record in responses.join(part_dir, self.rm):
                if record["k"] == 0 and part_of.setdefault(record["id"], part_dir) != part_dir:
                    raise InputError(
                        f"{part_dir}: expected each prompt in one part, found {record['id']} in two"
                    )
                self.rewards.append(record["reward"])
                self.n_empty += not record["response"].strip()
                yield record
        if len(part_of) != n_prompts:
            raise InputError(
                f"{self.part_dirs[0].parent}: expected {n_prompts} prompts, found {len(part_of)}; "
                "run step 2 again"
            )


def check_parts(args, part_dirs, rm):
    """(K, record of the prompts, {part: digests}) of parts that are all there and agree."""
    facts, prompt_records, inputs = {}, [], {}
    for part_dir in part_dirs:
        number = part_dir.name[-1]
        sampled = responses.finished(
            part_dir, "step2", ["prompts.json"], f"step2_gen_sample.py --split {number}"
        )
        scored = responses.finished(
            part_dir, f"step3 {rm}", [], f"step3_reward_annotation.py --split {number}"
        )
        facts[part_dir.name] = facts_of(sampled, scored)
        prompt_records.append(artifacts.read_json(part_dir / "prompts.json", "step 2"))
        inputs[part_dir.name] = [
            sampled["outputs"]["responses.jsonl"]["sha256"],
            scored["hash"],
        ]
    first, folder = part_dirs[0].name, part_dirs[0].parent
    for name, part_facts in facts.items():
        for what, value in part_facts.items():
            expected = facts[first][what]
            if value != expected:
                raise InputError(
                    f"{folder / name}: expected the {what} of {first} ({str(expected)[:80]}), "
                    f"found {str(value)[:80]}; run that part again with the same settings"
                )
    if any(record != prompt_records[0] for record in prompt_records):
        raise InputError(
            f"{folder}: expected parts of one set of prompts, found several; run step 2 again"
        )
    n_responses = facts[first]["K"]
    if args.n_samples and args.n_samples != n_responses:
        raise InputError(
            f"{part_dirs[0]}: expected {args.n_samples} responses a prompt, found {n_responses}; "
            "run step 2 again or change --n_samples"
        )
    return n_responses, prompt_records[0], inputs


def facts_of(sampled, scored):
    """What the parts must agree on, from the manifest entries of steps 2 and 3."""
    settings, source = dict(sampled["arguments"]), dict(sampled["inputs"])
    source.pop("prompts")
    return {
        "K": settings.pop("n_samples"),
        "sampling settings": settings,
        "generator": source,
        "scoring settings": scored["arguments"],
        "reward model": scored["inputs"]["reward_model"],
    }


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
