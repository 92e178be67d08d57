"""Prepared data from arrays that exist, a half of the prompts of prepared data, and pairs made of its ratings.

EMBD_*.npy (K, N, D), ATTRIBUTES_*.npy (K, N, A), attributes.json (A names), PROMPTEMBD_*.npy (N, D'): rated responses
.npz: embeddings (n, 2, D) chosen then rejected, prompt_embeddings (n, D'), subset (n,): pairs
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.data import published
from rewardlib.errors import InputError
from studies.interpretable import attribute_data
from studies.interpretable.attribute_data import Rated

NAMES_FILE = "attributes.json"


# ------------------------------------------------------------------------------------------- arrays


def from_arrays(embeddings, labels, names, prompt_embeddings, source):
    """Rated responses, one block of N rows for each of the K responses, from the files named; see the module.

    names: the .json with the A names; prompt_embeddings: None where there are none: prompts then
    count as different. Row n of block k has the id "n-k". Nothing is copied: the arrays stay
    memory-mapped.
    """
    rows, values = published.open_array(embeddings), published.open_array(labels)
    if rows.ndim != 3 or values.ndim not in (2, 3) or rows.shape[:2] != values.shape[:2]:
        raise InputError(
            f"{labels}: expected labels (K, N, A) of the K responses to N prompts of {Path(embeddings).name}, found "
            f"{values.shape} for embeddings {rows.shape}; give the file that belongs to it"
        )
    n_responses, n, _ = rows.shape
    attributes = artifacts.read_json(names, "hand: a list of names")
    values = np.array(values, np.float32).reshape(n_responses * n, -1)
    if not isinstance(attributes, list) or len(attributes) != values.shape[1]:
        raise InputError(
            f"{names}: expected {values.shape[1]} names, one for each label, found {attributes}"
        )
    prompts = None if prompt_embeddings is None else published.open_array(prompt_embeddings)
    if prompts is not None and (prompts.ndim != 2 or len(prompts) != n):
        raise InputError(
            f"{prompt_embeddings}: expected ({n}, D), one for each prompt of {Path(embeddings).name}, found "
            f"{prompts.shape}; give the file that belongs to it"
        )
    groups = groups_of(prompts, n, source)
    return Rated(
        embeddings=[plain(rows[k]) for k in range(n_responses)],
        prompt_embeddings=None if prompts is None else [plain(prompts)] * n_responses,
        groups=np.tile(groups, n_responses),
        ids=[f"{i}-{k}" for k in range(n_responses) for i in range(n)],
        labels=values,
        attributes=attributes,
        source=source,
        path=Path(labels),
    )


def from_npz(path, source):
    """Pairs from the .npz `path`; without prompt_embeddings, prompts count as different. Ids are the row numbers."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: file[name]
                for name in file.files
                if name in ("embeddings", "prompt_embeddings", "subset")
            }
            unused = [name for name in file.files if name not in arrays]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: expected an .npz file of arrays, found: {error}; give another file"
        ) from None
    if "embeddings" not in arrays:
        raise InputError(
            f"{path}: expected an array named embeddings, found {', '.join(unused) or 'none'}"
        )
    if unused:
        print(f"prepare: {path}: not used: {', '.join(unused)}")
    prompts, n = arrays.get("prompt_embeddings"), len(arrays["embeddings"])
    return Rated(
        embeddings=[plain(arrays["embeddings"])],
        prompt_embeddings=None if prompts is None else [plain(prompts)],
        groups=groups_of(prompts, n, source),
        ids=[str(i) for i in range(n)],
        subsets=arrays["subset"].tolist() if "subset" in arrays else None,
        source=source,
        path=Path(path),
    )


def plain(array):
    """The array as attribute_data keeps it: float64 becomes float32."""
    return array.astype(np.float32) if array.dtype == np.float64 else array


def groups_of(prompts, n, source):
    """(n,) int64: equal for equal prompt embeddings, in every file; all different where there are none."""
    if prompts is None:
        return attribute_data.groups_of([f"{artifacts.hash_of(source)} {i}" for i in range(n)])
    return attribute_data.groups_of(
        [(np.asarray(row, np.float32) + 0).tobytes().hex() for row in prompts]
    )


# ---------------------------------------------------------------------------------------- selection


def in_half(groups, half, share, seed):
    """(n,) bool: whether a row's prompt is in the "first" half, of about `share` of the prompts, or in the "second".

    It depends on the prompt and the seed alone, so that two files of the same prompts are cut
    alike.
    """
    cut = int(share * 2**64)
    salt = seeds.rng(seed, "halves of the prompts").bytes(16)
    drawn = [
        hashlib.sha256(salt + int(group).to_bytes(8, "little")).digest()[:8] for group in groups
    ]
    first = np.array([int.from_bytes(one, "little") < cut for one in drawn])
    return first if half == "first" else ~first


def take(rated, rows):
    """The given rows alone, copied in the type they are stored in."""
    return replace(
        rated,
        embeddings=[gather(rated.embeddings, rows)],
        prompt_embeddings=None
        if rated.prompt_embeddings is None
        else [gather(rated.prompt_embeddings, rows)],
        groups=rated.groups[rows],
        ids=[rated.ids[i] for i in rows],
        labels=None if rated.labels is None else rated.labels[rows],
        subsets=None if rated.subsets is None else [rated.subsets[i] for i in rows],
    )


def gather(parts, rows):
    """Rows of arrays that follow one another, in their type."""
    return attribute_data.gather(parts, rows, parts[0].dtype)


def choose(rated, attributes):
    """`rated` with the labels named `attributes` alone, in that order."""
    columns = [rated.column(name) for name in attributes]
    return replace(rated, attributes=list(attributes), labels=rated.labels[:, columns])


# -------------------------------------------------------------------------------------------- pairs


def pairs_of(rated, attribute, concepts, min_gap, n_pairs, seed):
    """(pairs as Rated, counts): responses to one prompt, that with the higher label of `attribute` is the chosen one.

    At most n_pairs of each prompt, drawn without replacement among those whose labels differ by
    more than min_gap. concepts: names of further attributes, whose labels become 1 where the chosen
    response has more of it, 0 where less, 0.5 where as much, NaN where one is missing. counts: the
    prompts, those without a pair, and the possible pairs left out because of their gap.
    """
    label = rated.labels[:, rated.column(attribute)].astype(float)
    order = np.argsort(rated.groups, kind="stable")
    by_prompt = np.split(order, np.flatnonzero(np.diff(rated.groups[order])) + 1)
    found, counts = (
        [],
        {"prompts": len(by_prompt), "prompts_without_a_pair": 0, "pairs_of_too_small_a_gap": 0},
    )
    for rows in by_prompt:
        rows = rows[np.isfinite(label[rows])]
        first, second = (rows[side] for side in np.triu_indices(len(rows), 1))
        gap = label[first] - label[second]
        clear = np.flatnonzero(np.abs(gap) > min_gap)
        counts["pairs_of_too_small_a_gap"] += len(gap) - len(clear)
        if not len(clear):
            counts["prompts_without_a_pair"] += 1
            continue
        rng = seeds.rng(seed, "pairs of a prompt", int(rated.groups[rows[0]]))
        clear = np.sort(rng.permutation(clear)[:n_pairs])
        sides = (first[clear], second[clear])
        found.append(np.where(gap[clear] > 0, sides, sides[::-1]).T)
    if not found:
        raise InputError(
            f"--pairs_from {attribute}: expected responses to one prompt whose labels differ by more than {min_gap}, "
            "found none; lower --min_gap"
        )
    rows = np.concatenate(found)
    sides = np.stack([gather(rated.embeddings, side) for side in rows.T], 1)
    prompts = (
        None if rated.prompt_embeddings is None else [gather(rated.prompt_embeddings, rows[:, 0])]
    )
    values = rated.labels[:, [rated.column(name) for name in concepts]]
    difference = values[rows[:, 0]] - values[rows[:, 1]]
    pairs = Rated(
        embeddings=[sides],
        prompt_embeddings=prompts,
        groups=rated.groups[rows[:, 0]],
        ids=[f"{rated.ids[a]} over {rated.ids[b]}" for a, b in rows],
        labels=np.float32(0.5) + np.sign(difference) / 2 if concepts else None,
        attributes=list(concepts),
        subsets=None if rated.subsets is None else [rated.subsets[a] for a, _ in rows],
        source=rated.source,
        left_out=rated.left_out,
    )
    return pairs, counts
