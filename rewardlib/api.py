"""The way in without scripts: load arrays, annotate pairs, and measure what a reward model predicts, a call each.

load_embd_data -> pair_annotate -> an estimator's fit and predict -> calc_bon, calc_spearmanr;
docs/api.md has the page. Embeddings are (N, K, D): K responses to each of N prompts. Rewards and
predictions are (N, K, 1), or (N, K).
"""

import dataclasses
import operator
import os
from pathlib import Path

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.data import embeddings, pairs, published, splits
from rewardlib.errors import InputError
from rewardlib.llm import responses
from rewardlib.measures import ranking

ROOT_ENV, USUAL_ROOT = "EMBD_REPO_DIR", Path("embd/RM-Embeddings")
STRATEGIES = ("random", "diverse", "similar", "cross_prompt")
TUNED = "-sft"
FOLDS, FOLD_PROMPTS = (
    10,
    20,
)  # cross-prompt pairs stay within one of at most so many folds of at least so many prompts
CALL = {  # what settles a doubt, as load_embd_data calls it; see published.COMMAND
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
    task,
    res_gen_model,
    embed_model,
    split,
    root=None,
    dataset=None,
    reward_model=None,
    max_prompts=None,
    axes=None,
):
    """Embeddings (N, K, D) and golden rewards (N, K, 1) of one split, memory-mapped: rows are read when they are used.

    task: what the golden reward rates, as in the file names; res_gen_model: the model that wrote
    the responses; embed_model: the model that embedded them; split: "train" or "test"; all of them
    case aside. root: the folder to search, sub-folders included; None is the environment variable
    EMBD_REPO_DIR or, unset, run_all.sh's embd/RM-Embeddings or, where there is none, the working
    directory. dataset: name of the prompts in formats 1 and 2; None is hh-rlhf-{task} with or
    without -gpt4, or the task itself where it is neither helpful nor harmless. reward_model: which
    rewards, where there are several. max_prompts: how many of the prompts, the first ones. axes:
    "KND" or "NKD", the order in the embedding file, where its shape leaves that open.

    All formats of rewardlib.published are found. "-sft" at the end of res_gen_model is part of the
    name in format 3; in formats 1 and 2, where the data set tells what the model was tuned on, it
    may stand for a data set in -gpt4. The embeddings are a memmap of the file's dtype, axes swapped
    where the file has another order; so are rewards of float32 or float64 (others: a float64 copy).
    A DATA_DIR is found where its manifest says that it was made from files of these names, and
    where `root` is that folder itself and records no names; its embeddings, one file a response,
    are StackedFiles. Prints what was taken. InputError where nothing fits or several do, naming
    what was found and the argument that settles it.
    """
    for name, value in (
        ("task", task),
        ("res_gen_model", res_gen_model),
        ("embed_model", embed_model),
    ):
        if not isinstance(value, str) or not value:
            raise InputError(
                f"{name}: expected a name as in the file names, found {value!r}; give one"
            )
    split = _one_of("split", str(split).lower(), ("train", "test"))
    axes = "auto" if axes is None else _one_of("axes", str(axes).upper(), ("KND", "NKD"))
    root = Path(root or os.environ.get(ROOT_ENV) or (USUAL_ROOT if USUAL_ROOT.is_dir() else "."))
    files = published.files_in(root, CALL)
    wanted = _wanted(task, dataset, embed_model, res_gen_model, reward_model)
    pair = published.find(files, root, split, *wanted, words=CALL)
    recorded = {folder: _recorded_names(folder, split) for folder in _data_dirs(files, split)}
    folders = [
        folder for folder, names in recorded.items() if _fits(names, split, wanted, folder == root)
    ]
    found = [*folders, *(pair or ())[:1]]
    if len(found) > 1:
        raise InputError(
            f"{root}: expected one source of {split} embeddings, found {len(found)}: {', '.join(map(str, found))}; "
            f"choose with {CALL['narrower']}"
        )
    if not found:
        there = [
            f"; DATA_DIR {folder}: {names[0] if names else 'no names'}"
            for folder, names in recorded.items()
        ]
        note = " (a DATA_DIR without names is taken as root= itself)" if there else ""
        raise InputError(
            f"{published.not_found(files, root, split, *wanted, words=CALL)}{''.join(there)}{note}"
        )
    if folders:
        embedding, rewards, told = _open_data_dir(folders[0], split, recorded[folders[0]])
    else:
        embedding, rewards, told = _open_published(pair, axes)
    n, k, d = embedding.shape
    if max_prompts is not None:
        if _whole("max_prompts", max_prompts, 1) > n:
            print(
                f"load_embd_data: all {n} prompts are taken; max_prompts {max_prompts} is more than there are"
            )
        n = min(n, max_prompts)
        embedding, rewards = (embedding.first(n) if folders else embedding[:n]), rewards[:n]
    print(
        f"load_embd_data: {split}: {n} prompts x {k} responses x {d} dimensions, {embedding.dtype}, from {told}"
    )
    return embedding, rewards


class StackedFiles:
    """K memory-mapped arrays (N, D) seen as one (N, K, D), for files that no single memory map can span.

    Indexing and np.asarray read what they name and return plain arrays. The first two axes take
    whatever NumPy takes there: numbers, slices, masks, index arrays; the last one a number or a
    slice.
    """

    ndim = 3

    def __init__(self, arrays):
        self.arrays = arrays
        self.shape = (len(arrays[0]), len(arrays), arrays[0].shape[1])
        self.dtype = np.result_type(*arrays)
        self._rows = np.arange(self.shape[0] * self.shape[1]).reshape(self.shape[:2])

    def first(self, n):
        """The first n prompts, as unread as before."""
        return StackedFiles([array[:n] for array in self.arrays])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        key = key if isinstance(key, tuple) else (key,)
        if any(part is Ellipsis for part in key):
            at = next(i for i, part in enumerate(key) if part is Ellipsis)
            key = (*key[:at], *[slice(None)] * (4 - len(key)), *key[at + 1 :])
        last = key[2] if len(key) == 3 else slice(None)
        if len(key) > 3 or not isinstance(last, (int, np.integer, slice)):
            raise IndexError(
                f"expected at most 3 indices, the last a number or a slice, found {key!r}"
            )
        rows = np.asarray(self._rows[key[:2]])
        prompt, response = np.divmod(rows.ravel(), self.shape[1])
        found = np.empty((rows.size, self.shape[2]), self.dtype)
        for k in np.unique(response):
            found[response == k] = self.arrays[k][prompt[response == k]]
        return found.reshape(*rows.shape, self.shape[2])[..., last]

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError(
                f"expected copy=True or None: the {self.shape[1]} files are not one array in memory"
            )
        return np.stack(self.arrays, axis=1, dtype=dtype or self.dtype, casting="unsafe")

    def __repr__(self):
        return f"StackedFiles(shape={self.shape}, dtype={self.dtype})"


def _wanted(task, dataset, embed_model, gen_model, reward_model):
    """What the file names may hold, as published.names(...) gives it."""
    datasets = [dataset] if dataset else [task]
    if not dataset and task.lower() in published.TASKS:
        datasets = [f"hh-rlhf-{task}-gpt4", f"hh-rlhf-{task}"]
    wanted = [
        published.names(task, name, "gpt4", embed_model, gen_model, reward_model)
        for name in datasets
    ]
    if gen_model.lower().endswith(TUNED):
        tuned = published.names(
            task, datasets[0], "gpt4", embed_model, gen_model[: -len(TUNED)], reward_model
        )
        wanted.append({**tuned, "formats": (1, 2)})
    return wanted


def _data_dirs(files, split):
    """The folders among `files` that hold embeddings in DATA_DIR's format."""
    first = embeddings.file_names(split, 0)[0]
    return sorted({path.parent for path in files if path.name == first})


def _recorded_names(folder, split):
    """The published names of the embeddings and the rewards in a DATA_DIR, by its manifest, or None."""
    manifest = artifacts.read_manifest(folder)
    if source := manifest.get("source", {}).get(split):
        return Path(source["embedding_file"]).name, Path(source["reward_file"]).name
    told = manifest.get("arguments", {})
    names = {
        "dataset": "dataset",
        "embed": "embed_model_name",
        "gen": "gen_pref_model_name",
        "rm": "reward_model",
    }
    if not all(told.get(name) for name in names.values()):
        return None
    fields = {field: responses.label(told[name]) for field, name in names.items()}
    embedding, (reward,) = published.FORMATS[1]
    return embedding.format(**fields, split=split), reward.format(**fields, split=split)


def _fits(names, split, wanted, is_root):
    """True where a DATA_DIR of the recorded `names` holds what is wanted, or was asked for itself and has no names."""
    if names and published.embedding_files([Path(names[0])], split, *wanted):
        reward_model, asked = published.read_name(names[1])[1].get("rm"), wanted[0]["rm"]
        return not asked or reward_model in (None, asked.lower())
    return is_root and (names is None or published.read_name(names[0])[0] is None)


def _open_data_dir(folder, split, names):
    data = embeddings.load(folder, split)
    told = f"DATA_DIR {folder} ({f'made from {names[0]}' if names else 'it records no names to compare'})"
    return StackedFiles(data.embeddings), data.rewards[:, :, None], told


def _open_published(pair, axes):
    source = published.open_source(*pair, axes, CALL)
    array, rewards = published.open_array(source.embedding), published.open_array(source.reward)
    rewards = rewards.reshape(rewards.shape[:2])
    array = array if source.axes == "NKD" else array.swapaxes(0, 1)
    rewards = rewards if source.reward_axes == "NK" else rewards.T
    if rewards.dtype.name not in ("float32", "float64"):
        rewards = rewards.astype(np.float64)
    told = f"{source.embedding} with {source.reward.name} (format {source.format}, {source.axes})"
    return array, rewards[:, :, None], told


# ----------------------------------------------------------------------------------------- annotate


class Annotated(tuple):
    """(comparisons, labels) of pair_annotate, and what is behind them.

    pairs: rewardlib.pairs.Pairs: label_error, prompts (M, 2), responses (M, 2), probability (M,),
    reward_diff (M,), n_equal. groups: (M,) numbers to pass to `fit`: pairs of different groups
    share no prompt.
    """

    def __new__(cls, comparisons, labels, made):
        annotated = super().__new__(cls, (comparisons, labels))
        annotated.pairs = made
        return annotated

    def __getnewargs__(self):
        return (*self, self.pairs)

    @property
    def groups(self):
        return self.pairs.folds


def pair_annotate(
    embeddings,
    rewards,
    annotation_quality,
    pair_strategy="random",
    pairs_per_prompt=10,
    rng=None,
    reward_scale=None,
    return_index=False,
):
    """Comparisons (M, 2, D) and what a noisy annotator says of them, labels (M,): 1 where side 0 was preferred, else 0.

    P(side 0 preferred) = sigmoid(annotation_quality * (r_0 - r_1) / reward_scale), arXiv
    2411.04991, section 4; below 0: perfect labels. reward_scale None is the standard deviation of
    `rewards`: at quality 0.1 nearly half the labels are wrong, at 10 about 4 % (of responses to one
    prompt, more: their rewards differ less).

    pair_strategy: "random" any two responses to a prompt; "diverse" the two whose ranks by reward
    lie furthest apart, then the next furthest; "similar" neighbours in rank, from the middle
    outwards, then ranks two apart, and so on; with one pair per prompt these are the lowest with
    the highest and the middle two. "cross_prompt" a response to each prompt with one to another
    prompt. No pair comes twice, in either order; which response is side 0 is random. Pairs of equal
    golden reward carry no order: they are left out, and counted in the line that is printed.

    rng: a seed or a numpy Generator; None is seed 0, so that a cell gives the same pairs each time
    it is run. return_index=True gives row numbers (M, 2) into embeddings.reshape(N * K, D) in place
    of the comparisons, and no embedding is read. Returns Annotated: two values to unpack, which
    also keep the realised label error as .pairs.label_error and, as .groups, which pairs to hold
    out together. Cross-prompt pairs are drawn within groups of prompts for that. InputError for
    other shapes, rewards that are not finite or all equal, more pairs than there are.
    """
    rewards = _per_response("rewards", rewards)
    embeddings = embeddings if hasattr(embeddings, "shape") else np.asarray(embeddings)
    n, k = rewards.shape
    if len(embeddings.shape) != 3 or tuple(embeddings.shape[:2]) != (n, k):
        raise InputError(
            f"embeddings: expected (N, K, D) = ({n}, {k}, D) as the rewards are, found {tuple(embeddings.shape)}; "
            "load_embd_data gives both in this order"
        )
    _one_of("pair_strategy", pair_strategy, STRATEGIES)
    quality = _number("annotation_quality", annotation_quality)
    n_pairs, most = _whole("pairs_per_prompt", pairs_per_prompt, 1), k * (k - 1) // 2
    if pair_strategy != "cross_prompt" and n_pairs > most:
        raise InputError(
            f"pairs_per_prompt: expected at most {most}, the pairs of {k} responses, found {n_pairs}; lower it, or use "
            "pair_strategy='cross_prompt'"
        )
    scale = rewards.std() or 1.0
    if reward_scale is not None and (scale := _number("reward_scale", reward_scale)) <= 0:
        raise InputError(
            f"reward_scale: expected a number above 0, found {scale:g}; None takes the rewards' sd"
        )
    if not isinstance(rng, np.random.Generator):
        rng = seeds.rng(_whole("rng", 0 if rng is None else rng, 0), "pairs")
    made = _draw(rewards, pair_strategy, n_pairs, quality, scale, rng)
    print(
        f"pair_annotate: {len(made.labels)} {pair_strategy} pairs on {n} prompts; {made.n_equal} of equal reward left "
        f"out; label error {made.label_error:.3f} (quality {quality:g}, scale {scale:.4g})"
    )
    index = made.prompts * k + made.responses
    comparisons = index if return_index else np.asarray(embeddings[made.prompts, made.responses])
    return Annotated(comparisons, made.labels.astype(np.int64), made)


def _draw(rewards, strategy, n_pairs, quality, scale, rng):
    """pairs.Pairs of (N, K) rewards, n_pairs for each prompt; its folds are the groups of Annotated."""
    prompts, noise = (
        np.arange(len(rewards)),
        {"consider_first_n": 2, "quality": quality, "scale": scale, "rng": rng},
    )
    if strategy == "cross_prompt":
        folds = splits.assign_folds(
            prompts, int(np.clip(len(prompts) // FOLD_PROMPTS, 1, FOLDS)), rng
        )
        return pairs.build(rewards, folds, pairing="xprompt", n_pairs=n_pairs, **noise)
    if strategy == "random":
        return pairs.build(rewards, prompts, pairing="sameprompt", n_pairs=n_pairs, **noise)
    # each chosen pair stands for a prompt of two responses, whose one pair is then turned and
    # annotated
    chosen, prompt = (
        by_rank_gap(rewards, n_pairs, strategy == "diverse").reshape(-1, 2),
        np.repeat(prompts, n_pairs),
    )
    made = pairs.build(
        rewards[prompt[:, None], chosen], prompt, pairing="sameprompt", n_pairs=1, **noise
    )
    sides = {"prompts": prompt[made.prompts], "responses": chosen[made.prompts, made.responses]}
    return dataclasses.replace(made, **sides)


def by_rank_gap(rewards, n_pairs, widest):
    """The n_pairs pairs of each prompt furthest apart in rank by reward, or nearest, (N, n_pairs, 2) responses.

    Of equal gaps those come first whose ranks lie around the middle. The first pair is that of
    pairs.candidates: the lowest and the highest, or the middle two.
    """
    order, k = np.argsort(rewards, axis=1, kind="stable"), rewards.shape[1]
    low, high = np.triu_indices(k, 1)
    first = np.lexsort([abs(low + high - (k - 1)), (low - high) if widest else (high - low)])[
        :n_pairs
    ]
    return np.stack([order[:, low[first]], order[:, high[first]]], -1)


# ------------------------------------------------------------------------------------------ measure


def calc_bon(predictions, rewards, N):
    """Expected golden reward of the response that `predictions` rate best of N of a prompt's K, averaged over prompts.

    predictions, rewards: (N prompts, K, 1) or (N prompts, K). Exact: the mean over all subsets of N
    responses, equal predictions sharing alike (metrics.best_of_n). InputError for other shapes,
    NaN, or N above K.
    """
    scores, golden = _both(predictions, rewards)
    size, k = _whole("N", N, 1), scores.shape[1]
    if size > k:
        raise InputError(
            f"N: expected at most {k}, the responses to each prompt, found {size}; lower it"
        )
    return float(ranking.best_of_n(scores, golden, [size]).mean())


def calc_spearmanr(predictions, rewards):
    """Spearman's rho of predictions and golden rewards within each prompt, averaged over prompts.

    predictions, rewards: (N, K, 1) or (N, K). Prompts without a ranking (all rewards equal, or all
    predictions) are left out and counted in a line that is printed; NaN where none is left.
    InputError for other shapes or NaN.
    """
    rho = ranking.spearman(*_both(predictions, rewards))
    defined = np.isfinite(rho)
    if not defined.all():
        left_out = f"{(~defined).sum()} of {len(rho)} prompts left out"
        print(f"calc_spearmanr: {left_out}: all their rewards, or all their predictions, are equal")
    return float(rho[defined].mean()) if defined.any() else float("nan")


# ------------------------------------------------------------------------------------------- checks


def _both(predictions, rewards):
    scores, golden = _per_response("predictions", predictions), _per_response("rewards", rewards)
    if scores.shape != golden.shape:
        raise InputError(
            f"predictions: expected one for each of {golden.shape[0]} x {golden.shape[1]} rewards, found "
            f"{scores.shape[0]} x {scores.shape[1]}; predict on the embeddings that were loaded with them"
        )
    return scores, golden


def _per_response(name, values):
    """(N, K) float64 of (N, K, 1) or (N, K) finite numbers."""
    array = np.asarray(values)
    if (
        array.ndim not in (2, 3)
        or array.shape[2:] not in ((), (1,))
        or 0 in array.shape
        or array.dtype.kind not in "fiu"
    ):
        raise InputError(
            f"{name}: expected numbers in (N, K, 1) or (N, K), K responses to each of N prompts, found {array.shape} "
            f"of {array.dtype}; keep the axes that load_embd_data and predict give"
        )
    array = array.reshape(array.shape[:2]).astype(np.float64)
    if not np.isfinite(array).all():
        prompt, response = np.argwhere(~np.isfinite(array))[0]
        raise InputError(
            f"{name}: expected finite numbers, found {array[prompt, response]} at prompt {prompt}, response "
            f"{response}; score that response again, or leave its prompt out of both arrays"
        )
    return array


def _one_of(name, value, allowed):
    if value not in allowed:
        raise InputError(
            f"{name}: expected {', '.join(map(repr, allowed))}, found {value!r}; choose one of them"
        )
    return value


def _whole(name, value, least):
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(
            f"{name}: expected a whole number of at least {least}, found {value!r}; give one"
        )
    return number


def _number(name, value):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise InputError(f"{name}: expected a finite number, found {value!r}; give one")
    return number
