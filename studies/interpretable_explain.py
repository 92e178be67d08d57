"""What the interpretable reward of an example, or of a benchmark's subset in the mean, is made of.

For each attribute: its score, the score less its share of verbosity, the same in standard
deviations of the training responses, the gate's weight for this prompt, and weight times that: the
contribution. Their sum is the reward.

Reads   MODEL_DIR as interpretable_gating.py leaves it; --data: a prepared file, or --text with the --model that embeds
Writes  OUTPUT_DIR/explanation_{what}.json and .png
Example python studies/interpretable_explain.py --data prepared/pairs.safetensors --index 3
        python studies/interpretable_explain.py --data prepared/reward_bench.safetensors --subset donotanswer
        python studies/interpretable_explain.py --text "Is it safe?" "Yes, if you wear gloves." --model gemma2b
"""

import re
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts
from rewardlib.cli import console, kinds
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
INK, GREY = "#111213", "#828282"
COLOUR = {"chosen": "#0072B2", "rejected": "#E69F00", "response": "#0072B2", "weight": GREY}
RC = {
    "font.size": 9.5, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "legend.frameon": False,
}  # fmt: skip


def parse_args(argv=None):
    parser = console.parser(__doc__)
    group = parser.add_argument_group("what to explain")
    group.add_argument(
        "--data", help="a prepared file of pairs or rated responses, or a pattern of its shards"
    )
    group.add_argument("--index", type=kinds.seed, help="row of --data, from 0")
    group.add_argument("--subset", help="name of a subset of --data: the mean of its rows")
    group.add_argument(
        "--text", nargs=2, metavar=("PROMPT", "RESPONSE"), help="texts; needs --model"
    )
    group = parser.add_argument_group("embedding of --text, as in interpretable_prepare.py")
    group.add_argument("--model", help="gemma2b, gemma7b, llama38b, a hub id or a folder")
    group.add_argument(
        "--chat_template", type=Path, help="a Jinja file; None: the tokenizer's own template"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="bfloat16 on a GPU",
    )
    group.add_argument("--max_length", type=kinds.count, default=4096, help="most tokens")
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the model brings"
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--model_dir",
        default="interpretable_out",
        help="where the gate and the attribute heads are",
    )
    group.add_argument("--output_dir", help="results; None: --model_dir")
    args = parser.parse_args(argv)
    ways = [name for name in ("index", "subset", "text") if getattr(args, name) is not None]
    if len(ways) != 1:
        raise InputError(
            f"expected one of --index, --subset and --text, found {' and '.join(ways) or 'none'}"
        )
    needed, other = ("model", "data") if args.text else ("data", "model")
    if getattr(args, needed) is None:
        raise InputError(f"--{ways[0]}: expected --{needed} beside it, found none")
    if getattr(args, other) is not None:
        raise InputError(
            f"--{ways[0]}: expected no --{other} beside it, found {getattr(args, other)}; leave it out"
        )
    return args


def main(argv=None):
    args, started = parse_args(argv), time.time()
    output_dir = artifacts.writable_dir(args.output_dir or args.model_dir)
    data = embed(args) if args.text else attribute_data.read(args.data)
    gated = gating.load(args.model_dir, data)
    rows, what, stem = choose(args, data)
    explained = gating.explain(gated, data, rows)
    sides = SIDES if data.is_pairs else ("response",)
    content = {
        "what": what,
        "data": args.data,
        "text": args.text,
        "n_rows": len(rows),
        "ids": [data.ids[i] for i in rows],
        "share_of_pairs_right": explained["share_right"],
        "n_rows_trained_on": trained_on(args, data, rows),
        "weights": named(gated, explained["weights"]),
        "responses": {
            side: {measure: named(gated, explained[measure][k]) for measure in MEASURES}
            | {"reward": float(explained["reward"][k])}
            for k, side in enumerate(sides)
        },
    }
    outputs = [f"explanation_{stem}.json", f"explanation_{stem}.png"]
    with artifacts.lock(output_dir):
        inputs = {
            **data.digests,
            **{n: artifacts.sha256(Path(args.model_dir) / n) for n in HEADS_AND_GATE},
        }
        work = artifacts.identity(__file__, {"what": what, "text": args.text}, inputs)
        artifacts.write_json(output_dir / outputs[0], content)
        with artifacts.atomic(output_dir / outputs[1]) as file:
            draw(file, content, sides)
        artifacts.record(output_dir, f"explain {stem}", work, outputs, started)
    report(content, sides)
    print(f"explain: wrote {' and '.join(outputs)} to {output_dir}")


def embed(args):
    """The response of --text as one rated response with its prompt's embedding."""
    check_model(args)
    tokenizer = chat_embeddings.load_tokenizer(
        args.model, args.chat_template, args.trust_remote_code
    )
    model = loading.load_model("base", args.model, args.dtype, args.trust_remote_code)
    row = dict(zip(("prompt", "response"), args.text, strict=True))
    groups = attribute_data.groups_of(args.text[:1])
    chats = chat_data.Chats([row], np.arange(1), "rated", ["text"], groups, None, [], None, "")
    pad_id = loading.padding_token(tokenizer, args.model)
    limits = {
        "max_length": args.max_length,
        "batch_tokens": args.max_length,
        "storage_dtype": "float32",
    }
    rated, _ = chat_embeddings.embed(model, tokenizer, pad_id, chats, **limits)
    if rated.left_out:
        raise InputError(
            f"--text: expected at most {args.max_length} tokens that the model takes, found more"
        )
    return rated


def check_model(args):
    """InputError where --model is known not to be the one that embedded what the gate was trained on."""
    source = artifacts.read_json(Path(args.model_dir) / gating.RECORD, gating.MADE_BY)["pairs"][
        "source"
    ]
    while "made_of" in source:
        source = source["made_of"]
    if "model" not in source:
        print(
            "explain: whether --model embedded the gate's training data cannot be told from their record"
        )
    elif source["model"] != artifacts.hash_of(loading.fingerprint(args.model)):
        raise InputError(
            f"{args.model}: expected the model that embedded the gate's training data, {source['embedding_model']}, "
            "found another; give that one"
        )


def choose(args, data):
    """(row numbers, description, part of a file name) of what is to be explained."""
    if args.text:
        return np.arange(1), "text", "text"
    if args.index is not None:
        if args.index >= len(data.ids):
            raise InputError(
                f"--index: expected a row from 0 to {len(data.ids) - 1} of {args.data}, found {args.index}"
            )
        rows, what, name = (
            np.array([args.index]),
            f"row {args.index} ({data.ids[args.index]})",
            f"row_{args.index}",
        )
    else:
        names = data.subsets or []
        rows = np.flatnonzero(np.array(names) == args.subset)
        if not len(rows):
            known = ", ".join(dict.fromkeys(names)) or "none"
            raise InputError(f"{args.data}: expected a subset among {known}, found {args.subset!r}")
        what, name = f"mean of {len(rows)} rows of {args.subset}", args.subset
    return rows, what, re.sub(r"[^\w.-]+", "_", f"{Path(args.data).stem}_{name}")


def trained_on(args, data, rows):
    """How many of the rows have a prompt that the gate or the heads were fitted on; None where it cannot be told."""
    seen, known = gating.prompts_of_gate(args.model_dir, data)
    return int(np.isin(data.groups[rows], seen).sum()) if known else None


def named(gated, values):
    return dict(zip(gated.attributes, values.tolist(), strict=True))


def report(content, sides):
    print(f"explain: {content['what']}")
    for side in sides:
        row = content["responses"][side]
        print(
            f"  {side:30}{'score':>11}{'debiased':>11}{'in sd':>9}{'weight':>9}{'contribution':>14}"
        )
        for name, weight in content["weights"].items():
            score, debiased, standardised, contribution = (
                row[measure][name] for measure in MEASURES
            )
            print(
                f"    {name:28}{score:>11.3f}{debiased:>11.3f}{standardised:>9.3f}{weight:>9.3f}{contribution:>+14.4f}"
            )
        print(f"    {'reward':28}{row['reward']:>+54.4f}")
    if content["n_rows"] > 1:
        print(
            "  means over rows: a mean contribution is not the product of mean weight and mean score"
        )
    if content["share_of_pairs_right"] is not None:
        rewards = [content["responses"][side]["reward"] for side in SIDES]
        right = (
            f"; right for {content['share_of_pairs_right']:.1%} of the pairs"
            if content["n_rows"] > 1
            else ""
        )
        print(f"  chosen minus rejected {rewards[0] - rewards[1]:+.4f}{right}")
    if content["n_rows_trained_on"]:
        print(
            f"  {content['n_rows_trained_on']} of {content['n_rows']} rows have prompts that were trained on"
        )


def draw(file, content, sides):
    """Bars of the weights and, beside them, of the contributions of each response, as a PNG."""
    names = list(content["weights"])
    heights, width = np.arange(len(names)), 0.8 / len(sides)
    with style.context(["default", RC]):
        figure = Figure(figsize=(8, 1.5 + 0.38 * len(names)), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
        left.barh(
            heights, [content["weights"][name] for name in names], 0.6, color=COLOUR["weight"]
        )
        left.set(
            xlabel="weight for this prompt" if content["n_rows"] == 1 else "mean weight",
            xlim=(0, None),
        )
        left.set_yticks(heights, names)
        left.set_ylim(len(names) - 0.5, -0.5)
        for k, side in enumerate(sides):
            row = content["responses"][side]
            bars = [row["contribution"][name] for name in names]
            label = f"{side}, reward {row['reward']:+.3f}".replace("-", "−")
            right.barh(
                heights + (k + 0.5) * width - 0.4, bars, width, color=COLOUR[side], label=label
            )
        right.axvline(0, color=INK, linewidth=0.8)
        right.set(xlabel="contribution: weight × debiased score in sd")
        right.spines["left"].set_visible(False)
        right.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper right", ncols=len(sides))
        figure.suptitle(content["what"], x=0.01, ha="left", fontsize=9.5)
        figure.savefig(file, format="png", metadata={"Software": None})


if __name__ == "__main__":
    console.run(main, "explain")
