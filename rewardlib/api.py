"""Reward-model research without scripts: load arrays, annotate pairs, measure predictions.

load_embd_data -> pair_annotate -> `fit` and `predict` of an estimator -> calc_bon, calc_spearmanr;
docs/api.md shows them at work. Embeddings are (N, K, D): K responses to each of N prompts. Rewards
and predictions are (N, K, 1) or (N, K).
"""

import dataclasses
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.data import embeddings, pairs, published, splits
from rewardlib.errors import InputError
from rewardlib.llm.names import label
from rewardlib.measures import ranking

ROOT_ENV, USUAL_ROOT = "EMBD_REPO_DIR", Path("embd/RM-Embeddings")
STRATEGIES = ("random", "diverse", "similar", "cross_prompt")
TUNED = "-sft"  # end of the name of a supervised fine-tuned model
# Cross-prompt pairs stay within a fold: at most FOLDS folds of at least FOLD_PROMPTS prompts.
FOLDS, FOLD_PROMPTS = 10, 20
# How load_embd_data names the settings that an error asks for; see rewardlib/data/published.py.
CALL = {
    "folder": f"root, or set {ROOT_ENV}",
    "narrower": "a root that holds only the wanted files",
    "files": "a root that holds only the wanted files",
    "names": "dataset=, task=, embed_model=, res_gen_model=",
    "dataset": "dataset='{}'",
    "reward_model": "reward_model='{}'",
    "axes": "axes='{}'",
}


# --------------------------------------------------------------------------------------------- load


def load_embd_data(
    task: str,
    res_gen_model: str,
    embed_model: str,
    split: str,
    root: Path | str | None = None,
    dataset: str | None = None,
    reward_model: str | None = None,
    max_prompts: int | None = None,
    axes: str | None = None,
) -> tuple["np.ndarray | StackedFiles", np.ndarray]:
    """Memory-mapped embeddings (N, K, D) and golden rewards (N, K, 1) of one split.

    task, res_gen_model, embed_model: what the golden reward rates, the model that wrote the
    responses and the model that embedded them, as in the file names, in any case; split: "train" or
    "test". root: the folder to search, with its sub-folders; None is the environment variable
    EMBD_REPO_DIR or, if unset, embd/RM-Embeddings (the default of run_all.sh) or, if there is no
    such folder, the working directory. dataset: name of the prompts in formats 1 and 2; None is
    hh-rlhf-{task}, with or without -gpt4, or the task itself if it is neither helpful nor harmless.
    reward_model: whose rewards to load, where there are several. max_prompts: load only so many of
    the prompts, from the first. axes: "KND" or "NKD", the order in the embedding file, where its
    shape leaves that open.

    All formats of rewardlib.data.published are searched. "-sft" at the end of res_gen_model is part
    of the name in format 3. In formats 1 and 2 the data set tells what the model was tuned on, so
    "-sft" may also stand for a data set in -gpt4. The embeddings are a memory map with the dtype of
    the file, axes swapped if the file has another order; so are rewards of float32 or float64
    (others become a float64 copy). A DATA_DIR is found if its manifest says that it was made from
    files of these names, or if `root` is that folder itself and its manifest records no names; its
    embeddings, one file per response, come as StackedFiles.

    Prints what was loaded. Raises InputError if no source fits or if several do; the message lists
    them and names the argument that settles the choice.
    """
    required = {"task": task, "res_gen_model": res_gen_model, "embed_model": embed_model}
    for name, value in required.items():
        if not isinstance(value, str) or not value:
            raise InputError(f"{name}: expected a name as in the file names, found {value!r}")
    split = _one_of("split", str(split).lower(), ("train", "test"))
    axes = "auto" if axes is None else _one_of("axes", str(axes).upper(), ("KND", "NKD"))
    root = Path(root or os.environ.get(ROOT_ENV) or (USUAL_ROOT if USUAL_ROOT.is_dir() else "."))
    queries = _queries(task, dataset, embed_model, res_gen_model, reward_model)
    embeddings_NKD, rewards_NK1, source = _open_source(root, split, queries, axes)
    n, k, d = embeddings_NKD.shape
    if max_prompts is not None:
        if _whole("max_prompts", max_prompts, 1) > n:
            print(
                f"load_embd_data: all {n} prompts are taken; max_prompts {max_prompts} is more "
                "than there are"
            )
        n = min(n, max_prompts)
        is_stacked = isinstance(embeddings_NKD, StackedFiles)
        embeddings_NKD = embeddings_NKD.first(n) if is_stacked else embeddings_NKD[:n]
        rewards_NK1 = rewards_NK1[:n]
    print(
        f"load_embd_data: {split}: {n} prompts x {k} responses x {d} dimensions, "
        f"{embeddings_NKD.dtype}, from {source}"
    )
    return embeddings_NKD, rewards_NK1


def _open_source(root, split, queries, axes):
    """(embeddings (N, K, D), rewards (N, K, 1), name of the source) of the only source that fits.

    A source is a DATA_DIR below `root`, or two files in a published format.
    """
    files = published.files_in(root, CALL)
    pair = published.find(files, root, split, *queries, words=CALL)
    recorded = {folder: _recorded_names(folder, split) for folder in _data_dirs(files, split)}
    folders = [
        folder for folder, names in recorded.items() if _fits(names, split, queries, folder == root)
    ]
    sources = [*folders, *(pair or ())[:1]]
    if len(sources) > 1:
        raise InputError(
            f"{root}: expected one source of {split} embeddings, found {len(sources)}: "
            f"{', '.join(map(str, sources))}; choose with {CALL['narrower']}"
        )
    if not sources:
        data_dirs = "".join(
            f"; DATA_DIR {folder}: {names[0] if names else 'no names'}"
            for folder, names in recorded.items()
        )
        note = " (a DATA_DIR without names is taken as root= itself)" if recorded else ""
        missing = published.not_found(files, root, split, *queries, words=CALL)
        raise InputError(f"{missing}{data_dirs}{note}")
    if folders:
        return _open_data_dir(folders[0], split, recorded[folders[0]])
    return _open_published(pair, axes)


class StackedFiles:
    """K memory-mapped arrays (N, D) as one (N, K, D), for files that no single memory map can span.

    Indexing reads only the rows asked for, np.asarray reads all; both return plain arrays. The
    first two axes take any index of NumPy: numbers, slices, masks, index arrays; the last axis
    takes a number or a slice.
    """

    ndim = 3

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.shape = (len(arrays[0]), len(arrays), arrays[0].shape[1])
        self.dtype = np.result_type(*arrays)
        self._rows_NK = np.arange(self.shape[0] * self.shape[1]).reshape(self.shape[:2])

    def first(self, n: int) -> "StackedFiles":
        """The first n prompts, without reading any."""
        return StackedFiles([array[:n] for array in self.arrays])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        if any(part is Ellipsis for part in key):
            position = next(i for i, part in enumerate(key) if part is Ellipsis)
            colons = [slice(None)] * (4 - len(key))
            key = (*key[:position], *colons, *key[position + 1 :])
        last = key[2] if len(key) == 3 else slice(None)
        if len(key) > 3 or not isinstance(last, (int, np.integer, slice)):
            raise IndexError(
                f"expected at most 3 indices, the last a number or a slice, found {key!r}"
            )
        # NumPy itself applies the first two indices, to an array of row numbers
        rows = np.asarray(self._rows_NK[key[:2]])
        prompts, responses = np.divmod(rows.ravel(), self.shape[1])
        embeddings = np.empty((rows.size, self.shape[2]), self.dtype)
        for k in np.unique(responses):
            in_file = responses == k
            embeddings[in_file] = self.arrays[k][prompts[in_file]]
        return embeddings.reshape(*rows.shape, self.shape[2])[..., last]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                f"expected copy=True or None: the {self.shape[1]} files are not one array in memory"
            )
        return np.stack(self.arrays, axis=1, dtype=dtype or self.dtype, casting="unsafe")

    def __repr__(self) -> str:
        return f"StackedFiles(shape={self.shape}, dtype={self.dtype})"


def _queries(task, dataset, embed_model, gen_model, reward_model):
    """What the file names may hold: queries for published.find."""
    datasets = [dataset] if dataset else [task]
    if not dataset and task.lower() in published.TASKS:
        datasets = [f"hh-rlhf-{task}-gpt4", f"hh-rlhf-{task}"]
    queries = [
        published.names(task, name, "gpt4", embed_model, gen_model, reward_model)
        for name in datasets
    ]
    if gen_model.lower().endswith(TUNED):
        plain = gen_model[: -len(TUNED)]
        tuned = published.names(task, datasets[0], "gpt4", embed_model, plain, reward_model)
        queries.append({**tuned, "formats": (1, 2)})
    return queries


def _data_dirs(files, split):
    """The folders of `files` that hold embeddings in the format of DATA_DIR, sorted."""
    first = embeddings.file_names(split, 0)[0]
    return sorted({path.parent for path in files if path.name == first})


def _recorded_names(folder, split):
    """(embedding, reward) file names that a DATA_DIR was made from, by its manifest, or None.

    For the data of step 4, the names that its models and data set have in format 1.
    """
    manifest = artifacts.read_manifest(folder)
    if source := manifest.get("source", {}).get(split):
        return Path(source["embedding_file"]).name, Path(source["reward_file"]).name
    arguments = manifest.get("arguments", {})
    argument_of = {
        "dataset": "dataset",
        "embed": "embed_model_name",
        "gen": "gen_pref_model_name",
        "rm": "reward_model",
    }
    if not all(arguments.get(name) for name in argument_of.values()):
        return None
    fields = {field: label(arguments[name]) for field, name in argument_of.items()}
    embedding, (reward,) = published.FORMATS[1]
    return embedding.format(**fields, split=split), reward.format(**fields, split=split)


def _fits(names, split, queries, is_root):
    """True if a DATA_DIR made from files of these `names` fits a query.

    A DATA_DIR without published names fits if it is the root of the search itself.
    """
    if names and published.embedding_files([Path(names[0])], split, *queries):
        recorded, requested = published.read_name(names[1])[1].get("rm"), queries[0]["rm"]
        return not requested or recorded in (None, requested.lower())
    return is_root and (names is None or published.read_name(names[0])[0] is None)


def _open_data_dir(folder, split, names):
    """(embeddings (N, K, D), rewards (N, K, 1), name of the source) of a DATA_DIR."""
    data = embeddings.load(folder, split)
    origin = f"made from {names[0]}" if names else "it records no names to compare"
    source = f"DATA_DIR {folder} ({origin})"
    return StackedFiles(data.embeddings), data.rewards[:, :, None], source


def _open_published(pair, axes):
    """(embeddings (N, K, D), rewards (N, K, 1), name of the source) of two published files."""
    source = published.open_source(*pair, axes, CALL)
    array, rewards = published.open_array(source.embedding), published.open_array(source.reward)
    embeddings_NKD = array if source.axes == "NKD" else array.swapaxes(0, 1)
    rewards = rewards.reshape(rewards.shape[:2])
    rewards_NK = rewards if source.reward_axes == "NK" else rewards.T
    if rewards_NK.dtype.name not in ("float32", "float64"):
        rewards_NK = rewards_NK.astype(np.float64)
    name = f"{source.embedding} with {source.reward.name} (format {source.format}, {source.axes})"
    return embeddings_NKD, rewards_NK[:, :, None], name


# ----------------------------------------------------------------------------------------- annotate


class Annotated(tuple):
    """(comparisons, labels) as pair_annotate returns them, and the annotated pairs behind them.

    pairs: rewardlib.data.pairs.Pairs, with label_error, prompts (M, 2), responses (M, 2),
    probability (M,), reward_diff (M,) and n_equal. groups: (M,) numbers for `fit`: pairs of
    different groups share no prompt.
    """

    def __new__(
        cls, comparisons: np.ndarray, labels: np.ndarray, annotated_pairs: pairs.Pairs
    ) -> "Annotated":
        annotated = super().__new__(cls, (comparisons, labels))
        annotated.pairs = annotated_pairs
        return annotated

    def __getnewargs__(self):  # what pickle passes to __new__
        return (*self, self.pairs)

    @property
    def groups(self) -> np.ndarray:
        return self.pairs.folds


def pair_annotate(
    embeddings: "np.ndarray | StackedFiles",
    rewards: np.ndarray,
    annotation_quality: float,
    pair_strategy: str = "random",
    pairs_per_prompt: int = 10,
    rng: int | np.random.Generator | None = None,
    reward_scale: float | None = None,
    return_index: bool = False,
) -> Annotated:
    """Comparisons (M, 2, D) and the labels (M,) of a noisy annotator: 1 if side 0 is preferred.

    embeddings: (N, K, D); rewards: (N, K, 1) or (N, K). P(side 0 preferred) =
    sigmoid(annotation_quality * (r_0 - r_1) / reward_scale), arXiv 2411.04991, section 4; a quality
    below 0 gives perfect labels. reward_scale None is the standard deviation of `rewards`: at
    quality 0.1 nearly half the labels are wrong, at 10 about 4 % (more for responses to the same
    prompt, whose rewards differ less).

    pair_strategy: "random" takes any two responses to a prompt. "diverse" takes the two whose ranks
    by reward are furthest apart, then the next furthest; "similar" takes neighbours in rank, from
    the middle outwards, then ranks two apart, and so on; with one pair per prompt these are the
    lowest with the highest and the middle two. "cross_prompt" pairs a response to each prompt with
    a response to another prompt. No pair comes twice, in either order; which response is side 0 is
    random. Pairs of equal golden reward have no order: they are left out, and the printed line
    counts them.

    rng: random seed or NumPy Generator; None is seed 0, so that running a cell again gives the same
    pairs. return_index=True returns row numbers (M, 2) into embeddings.reshape(N * K, D) in place
    of the comparisons, and reads no embeddings.

    Returns Annotated: two values to unpack, which also hold the realised label error as
    .pairs.label_error and, as .groups, which pairs to hold out together (cross-prompt pairs are
    drawn within groups of prompts to make this possible). Raises InputError for other shapes, for
    rewards that are not finite or all equal, and for more pairs than there are.
    """
    rewards = _per_response("rewards", rewards)
    embeddings = embeddings if hasattr(embeddings, "shape") else np.asarray(embeddings)
    n, k = rewards.shape
    if len(embeddings.shape) != 3 or tuple(embeddings.shape[:2]) != (n, k):
        raise InputError(
            f"embeddings: expected (N, K, D) = ({n}, {k}, D) as the rewards are, "
            f"found {tuple(embeddings.shape)}; load_embd_data gives both in this order"
        )
    _one_of("pair_strategy", pair_strategy, STRATEGIES)
    quality = _number("annotation_quality", annotation_quality)
    n_pairs, most = _whole("pairs_per_prompt", pairs_per_prompt, 1), k * (k - 1) // 2
    if pair_strategy != "cross_prompt" and n_pairs > most:
        raise InputError(
            f"pairs_per_prompt: expected at most {most}, the pairs of {k} responses, "
            f"found {n_pairs}; lower pairs_per_prompt, or use pair_strategy='cross_prompt'"
        )
    scale = rewards.std() or 1.0
    if reward_scale is not None and (scale := _number("reward_scale", reward_scale)) <= 0:
        raise InputError(
            f"reward_scale: expected a number above 0, found {scale:g}; None is the standard "
            "deviation of the rewards"
        )
    if not isinstance(rng, np.random.Generator):
        rng = seeds.rng(_whole("rng", 0 if rng is None else rng, 0), "pairs")
    annotated = _draw(rewards, pair_strategy, n_pairs, quality, scale, rng)
    print(
        f"pair_annotate: {len(annotated.labels)} {pair_strategy} pairs on {n} prompts; "
        f"{annotated.n_equal} of equal reward left out; label error {annotated.label_error:.3f} "
        f"(quality {quality:g}, scale {scale:.4g})"
    )
    if return_index:
        comparisons = annotated.prompts * k + annotated.responses
    else:
        comparisons = np.asarray(embeddings[annotated.prompts, annotated.responses])
    return Annotated(comparisons, annotated.labels.astype(np.int64), annotated)


def _draw(rewards, strategy, n_pairs, quality, scale, rng):
    """The annotated pairs.Pairs of the rewards (N, K), n_pairs for each prompt.

    Their folds are the groups of Annotated.
    """
    prompts = np.arange(len(rewards))
    options = {"consider_first_n": 2, "quality": quality, "scale": scale, "rng": rng}
    if strategy == "cross_prompt":
        n_folds = int(np.clip(len(prompts) // FOLD_PROMPTS, 1, FOLDS))
        folds = splits.assign_folds(prompts, n_folds, rng)
        return pairs.build(rewards, folds, pairing="xprompt", n_pairs=n_pairs, **options)
    if strategy == "random":
        return pairs.build(rewards, prompts, pairing="sameprompt", n_pairs=n_pairs, **options)
    # Each selected pair stands for a prompt with two responses. The only pair of that prompt is
    # what pairs.build draws, puts in random order and annotates.
    selected_M2 = by_rank_gap(rewards, n_pairs, strategy == "diverse").reshape(-1, 2)
    prompt_M = np.repeat(prompts, n_pairs)
    annotated = pairs.build(
        rewards[prompt_M[:, None], selected_M2],
        prompt_M,
        pairing="sameprompt",
        n_pairs=1,
        **options,
    )
    rows = annotated.prompts
    return dataclasses.replace(
        annotated, prompts=prompt_M[rows], responses=selected_M2[rows, annotated.responses]
    )


def by_rank_gap(rewards: np.ndarray, n_pairs: int, widest: bool) -> np.ndarray:
    """Responses (N, n_pairs, 2) of the pairs of each prompt that are furthest apart, or nearest.

    rewards: (N, K); the distance of a pair is that of its ranks by reward; widest: furthest first,
    else nearest first. Of equally distant pairs, those nearest to the middle ranks come first. The
    first pair is that of pairs.candidates: the lowest and the highest rank, or the middle two.
    """
    order, k = np.argsort(rewards, axis=1, kind="stable"), rewards.shape[1]
    low, high = np.triu_indices(k, 1)
    distance, off_centre = high - low, abs(low + high - (k - 1))
    first = np.lexsort([off_centre, -distance if widest else distance])[:n_pairs]
    return np.stack([order[:, low[first]], order[:, high[first]]], -1)


# ------------------------------------------------------------------------------------------ measure


def calc_bon(predictions: np.ndarray, rewards: np.ndarray, N: int) -> float:
    """Best-of-N: mean golden reward of the best-predicted of N random responses to each prompt.

    predictions, rewards: (prompts, K, 1) or (prompts, K). Exact: the mean over all subsets of N of
    the K responses, where equal predictions share alike, averaged over prompts; see
    rewardlib.measures.ranking.best_of_n. Raises InputError for other shapes, for values that are
    not finite and for N above K.
    """
    scores, golden = _both(predictions, rewards)
    size, k = _whole("N", N, 1), scores.shape[1]
    if size > k:
        raise InputError(
            f"N: expected at most {k}, the responses to each prompt, found {size}; lower N"
        )
    return float(ranking.best_of_n(scores, golden, [size]).mean())


def calc_spearmanr(predictions: np.ndarray, rewards: np.ndarray) -> float:
    """Spearman's rho of predictions and golden rewards within each prompt, averaged over prompts.

    predictions, rewards: (N, K, 1) or (N, K). Prompts without a ranking (all rewards equal, or all
    predictions) are left out, and a printed line counts them; NaN if no prompt is left. Raises
    InputError for other shapes or values that are not finite.
    """
    rho = ranking.spearman(*_both(predictions, rewards))
    defined = np.isfinite(rho)
    if not defined.all():
        left_out = f"{(~defined).sum()} of {len(rho)} prompts left out"
        print(f"calc_spearmanr: {left_out}: all their rewards, or all their predictions, are equal")
    return float(rho[defined].mean()) if defined.any() else float("nan")


# ------------------------------------------------------------------------------------------- checks


def _both(predictions, rewards):
    """Predictions and rewards as two (N, K) arrays of float64; InputError if the shapes differ."""
    scores, golden = _per_response("predictions", predictions), _per_response("rewards", rewards)
    if scores.shape != golden.shape:
        raise InputError(
            f"predictions: expected one for each of {golden.shape[0]} x {golden.shape[1]} rewards, "
            f"found {scores.shape[0]} x {scores.shape[1]}; predict on the embeddings that were "
            "loaded with these rewards"
        )
    return scores, golden


def _per_response(name, values):
    """Finite numbers (N, K, 1) or (N, K) as (N, K) float64; InputError for anything else."""
    array = np.asarray(values)
    if (
        array.ndim not in (2, 3)
        or array.shape[2:] not in ((), (1,))
        or 0 in array.shape
        or array.dtype.kind not in "fiu"
    ):
        raise InputError(
            f"{name}: expected numbers in (N, K, 1) or (N, K), K responses to each of N prompts, "
            f"found {array.shape} of {array.dtype}; keep the axes that load_embd_data and predict "
            "give"
        )
    array = array.reshape(array.shape[:2]).astype(np.float64)
    if not np.isfinite(array).all():
        prompt, response = np.argwhere(~np.isfinite(array))[0]
        raise InputError(
            f"{name}: expected finite numbers, found {array[prompt, response]} at prompt {prompt}, "
            f"response {response}; score that response again, or leave its prompt out of both "
            "arrays"
        )
    return array


def _one_of(name, value, allowed):
    """`value`, if it is one of the allowed values; else InputError."""
    if value not in allowed:
        raise InputError(
            f"{name}: expected {', '.join(map(repr, allowed))}, found {value!r}; choose one of them"
        )
    return value


def _whole(name, value, least):
    """`value` as an int of at least `least`; else InputError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(f"{name}: expected a whole number of at least {least}, found {value!r}")
    return number


def _number(name, value):
    """`value` as a finite float; else InputError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise InputError(f"{name}: expected a finite number, found {value!r}")
    return number
