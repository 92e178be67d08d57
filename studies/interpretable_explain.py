"""What the reward of an example, or the mean reward of a subset, is made of.

For each attribute: its score; the score less its share of verbosity; the same in standard
deviations of the training responses; the weight that the gate gives it for this prompt; and its
contribution, the product of the last two. The contributions add up to the reward.

Reads   MODEL_DIR of interpretable_gating.py; --data: a prepared file, or --text with the --model
        that embeds it
Writes  OUTPUT_DIR/explanation_{what}.json
Example python studies/interpretable_explain.py --data prepared/pairs.safetensors --index 3
        python studies/interpretable_explain.py --data prepared/reward_bench.safetensors \\
            --subset donotanswer
        python studies/interpretable_explain.py --text "Is it safe?" "Yes, if you wear gloves." \\
            --model gemma2b
"""

import re
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts
from rewardlib.cli import console, flags, kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading
from studies.interpretable import (
    attribute_data,
    chat_data,
    chat_embeddings,
    gating,
    multi_objective,
)

MEASURES = ("score", "debiased", "standardised", "contribution")
SIDES = ("chosen", "rejected")
HEADS_AND_GATE = (multi_objective.HEADS, gating.GATE)


def make_parser():
    """The parser of all flags. Flags that contradict each other pass; parse_args refuses them."""
    parser = console.parser(__doc__)
    group = parser.add_argument_group("what to explain")
    group.add_argument(
        "--data",
        help="prepared file of pairs or rated responses, or a quoted pattern of its shards",
    )
    group.add_argument("--index", type=kinds.seed, help="row of --data, counted from 0")
    group.add_argument("--subset", help="subset of --data, whose mean reward is explained")
    group.add_argument(
        "--text",
        nargs=2,
        metavar=("PROMPT", "RESPONSE"),
        help="texts of a prompt and a response, embedded with --model",
    )
    group = parser.add_argument_group("embedding of --text, as in interpretable_prepare.py")
    group.add_argument("--model", help=f"model that embeds: {flags.MODEL_HELP}")
    group.add_argument(
        "--chat_template",
        type=Path,
        help="Jinja file with a chat template; None: the template of the tokenizer",
    )
    group.add_argument(
        "--max_length",
        type=kinds.count,
        default=4096,
        help="largest number of tokens of prompt and response",
    )
    flags.add_language_model_flags(group)
    group = parser.add_argument_group("inputs and outputs")
    group.add_argument(
        "--model_dir",
        default="interpretable_out",
        help="folder with the gate and the attribute heads",
    )
    group.add_argument("--output_dir", help="folder for the results; None: --model_dir")
    return parser


def parse_args(argv=None):
    """The parsed flags; InputError where they contradict each other."""
    args = make_parser().parse_args(argv)
    subjects = [name for name in ("index", "subset", "text") if getattr(args, name) is not None]
    if len(subjects) != 1:
        raise InputError(
            "expected one of --index, --subset and --text, found "
            f"{' and '.join(subjects) or 'none'}"
        )
    needed, unused = ("model", "data") if args.text else ("data", "model")
    if getattr(args, needed) is None:
        raise InputError(f"--{subjects[0]} needs --{needed}")
    if getattr(args, unused) is not None:
        raise InputError(
            f"--{subjects[0]} does not use --{unused}, found {getattr(args, unused)}; leave it out"
        )
    return args


def main(argv=None):
    args, started = parse_args(argv), time.time()
    output_dir = artifacts.writable_dir(args.output_dir or args.model_dir)
    data = embed(args) if args.text else attribute_data.read(args.data)
    gated = gating.load(args.model_dir, data)
    rows, title, stem = choose(args, data)
    content = describe(args, gated, data, rows, title)
    output = f"explanation_{stem}.json"
    with artifacts.lock(output_dir):
        inputs = {
            **data.digests,
            **{name: artifacts.sha256(Path(args.model_dir) / name) for name in HEADS_AND_GATE},
        }
        work = artifacts.identity(__file__, {"what": title, "text": args.text}, inputs)
        artifacts.write_json(output_dir / output, content)
        artifacts.record(output_dir, f"explain {stem}", work, [output], started)
    report(content)
    print(f"explain: wrote {output} to {output_dir}")


# -------------------------------------------------------------------------------- what is explained


def embed(args):
    """The response of --text as one rated response with the embedding of its prompt."""
    check_model(args)
    tokenizer = chat_embeddings.load_tokenizer(
        args.model, args.chat_template, args.trust_remote_code
    )
    model = loading.load_model("base", args.model, args.dtype, args.trust_remote_code)
    prompt, response = args.text
    chats = chat_data.Chats(
        rows=[{"prompt": prompt, "response": response}],
        row_numbers=np.arange(1),
        kind="rated",
        ids=["text"],
        groups=attribute_data.groups_of([prompt]),
        labels=None,
        attributes=[],
        subsets=None,
        digest="",
    )
    rated, _ = chat_embeddings.embed(
        model,
        tokenizer,
        loading.padding_token(tokenizer, args.model),
        chats,
        max_length=args.max_length,
        batch_tokens=args.max_length,
        storage_dtype="float32",
    )
    if rated.left_out:
        raise InputError(
            f"--text: expected at most {args.max_length} tokens, and no more than the model has "
            "positions, found more; give a shorter text"
        )
    return rated


def check_model(args):
    """InputError where --model is known not to have embedded the training data of the gate."""
    record = artifacts.read_json(Path(args.model_dir) / gating.RECORD, gating.MADE_BY)
    source = record["pairs"]["source"]
    while "made_of" in source:
        source = source["made_of"]
    if "model" not in source:
        print(
            "explain: the files do not tell whether --model embedded the training data of the gate"
        )
    elif source["model"] != artifacts.hash_of(loading.fingerprint(args.model)):
        raise InputError(
            f"{args.model}: expected the model that embedded the training data of the gate, "
            f"{source['embedding_model']}, found another; give that model"
        )


def choose(args, data):
    """(row numbers, title, part of the file name) of what is explained."""
    if args.text:
        return np.arange(1), "text", "text"
    if args.index is not None:
        if args.index >= len(data.ids):
            raise InputError(
                f"--index: expected a row from 0 to {len(data.ids) - 1} of {args.data}, "
                f"found {args.index}"
            )
        rows, name = np.array([args.index]), f"row_{args.index}"
        title = f"row {args.index} ({data.ids[args.index]})"
    else:
        names = data.subsets or []
        rows, name = np.flatnonzero(np.array(names) == args.subset), args.subset
        if not len(rows):
            known = ", ".join(dict.fromkeys(names)) or "none"
            raise InputError(f"{args.data}: expected a subset among {known}, found {args.subset!r}")
        title = f"mean of {len(rows)} rows of {args.subset}"
    return rows, title, re.sub(r"[^\w.-]+", "_", f"{Path(args.data).stem}_{name}")


# -------------------------------------------------------------------------------------- explanation


def describe(args, gated, data, rows, title):
    """What explanation_*.json holds."""
    terms = gating.explain(gated, data, rows)

    def by_name(values):
        return dict(zip(gated.attributes, values.tolist(), strict=True))

    return {
        "what": title,
        "data": args.data,
        "text": args.text,
        "n_rows": len(rows),
        "ids": [data.ids[i] for i in rows],
        "share_of_pairs_right": terms["share_right"],
        "n_rows_trained_on": trained_on(args, data, rows),
        "weights": by_name(terms["weights"]),
        "responses": {
            side: {
                **{measure: by_name(terms[measure][k]) for measure in MEASURES},
                "reward": float(terms["reward"][k]),
            }
            for k, side in enumerate(SIDES if data.is_pairs else ("response",))
        },
    }


def trained_on(args, data, rows):
    """Number of rows whose prompt the gate or the heads were fitted on; None where not known."""
    seen, is_complete = gating.prompts_of_gate(args.model_dir, data)
    return int(np.isin(data.groups[rows], seen).sum()) if is_complete else None


def report(content):
    """Print the table of each response of an explanation."""
    print(f"explain: {content['what']}")
    for side, row in content["responses"].items():
        titles = f"{'score':>11}{'debiased':>11}{'in sd':>9}{'weight':>9}{'contribution':>14}"
        print(f"  {side:30}{titles}")
        for name, weight in content["weights"].items():
            score, debiased, in_sd, contribution = (row[measure][name] for measure in MEASURES)
            numbers = f"{score:>11.3f}{debiased:>11.3f}{in_sd:>9.3f}{weight:>9.3f}"
            print(f"    {name:28}{numbers}{contribution:>+14.4f}")
        print(f"    {'reward':28}{row['reward']:>+54.4f}")
    if content["n_rows"] > 1:
        print("  means over rows: a mean contribution is not mean weight times mean score")
    if content["share_of_pairs_right"] is not None:
        chosen, rejected = (content["responses"][side]["reward"] for side in SIDES)
        share = f"{content['share_of_pairs_right']:.1%}"
        right = f"; right for {share} of the pairs" if content["n_rows"] > 1 else ""
        print(f"  chosen minus rejected {chosen - rejected:+.4f}{right}")
    if content["n_rows_trained_on"]:
        counts = f"{content['n_rows_trained_on']} of {content['n_rows']}"
        print(f"  {counts} rows have prompts that were trained on")


if __name__ == "__main__":
    console.run(main, "explain")
