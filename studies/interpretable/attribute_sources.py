"""Prepared data from existing arrays, from a part of the prompts, and pairs from ratings.

Rated responses: EMBD_*.npy (K, N, D), ATTRIBUTES_*.npy (K, N, A), attributes.json (A names) and
PROMPTEMBD_*.npy (N, D'). Pairs: an .npz file with embeddings (n, 2, D), chosen then rejected,
prompt_embeddings (n, D') and subset (n,).
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
NPZ_ARRAYS = ("embeddings", "prompt_embeddings", "subset")


# ------------------------------------------------------------------------------------------- arrays


def from_arrays(
    embeddings: Path, labels: Path, names: Path, prompt_embeddings: Path | None, source: dict
) -> Rated:
    """Rated responses from .npy files, one block of N rows for each of the K responses.

    embeddings: file of (K, N, D); labels: file of (K, N, A); names: JSON file of A names;
    prompt_embeddings: file of (N, D'), or None: all prompts then count as different. Response k to
    prompt n has the id "n-k". The embeddings stay memory-mapped. InputError where shapes disagree.
    """
    emb_KND, labels_KNA = published.open_array(embeddings), published.open_array(labels)
    are_ranks_right = emb_KND.ndim == 3 and labels_KNA.ndim in (2, 3)
    if not are_ranks_right or emb_KND.shape[:2] != labels_KNA.shape[:2]:
        raise InputError(
            f"{labels}: expected labels (K, N, A) of the K responses to N prompts of "
            f"{Path(embeddings).name}, found {labels_KNA.shape} for embeddings {emb_KND.shape}; "
            "give the labels of these embeddings"
        )
    n_responses, n_prompts, _ = emb_KND.shape
    attributes = artifacts.read_json(names, "hand: a list of names")
    values = np.array(labels_KNA, np.float32).reshape(n_responses * n_prompts, -1)
    if not isinstance(attributes, list) or len(attributes) != values.shape[1]:
        raise InputError(
            f"{names}: expected {values.shape[1]} names, one for each label, found {attributes}"
        )
    prompts = None if prompt_embeddings is None else published.open_array(prompt_embeddings)
    if prompts is not None and (prompts.ndim != 2 or len(prompts) != n_prompts):
        raise InputError(
            f"{prompt_embeddings}: expected ({n_prompts}, D), one row for each prompt of "
            f"{Path(embeddings).name}, found {prompts.shape}; give the embeddings of these prompts"
        )
    groups = groups_of(prompts, n_prompts, source)
    return Rated(
        embeddings=[plain(emb_KND[k]) for k in range(n_responses)],
        prompt_embeddings=None if prompts is None else [plain(prompts)] * n_responses,
        groups=np.tile(groups, n_responses),
        ids=[f"{i}-{k}" for k in range(n_responses) for i in range(n_prompts)],
        labels=values,
        attributes=attributes,
        source=source,
        path=Path(labels),
    )


def from_npz(path: Path, source: dict) -> Rated:
    """Pairs from an .npz file, with row numbers as ids.

    Without prompt_embeddings all prompts count as different. Arrays that are not used are printed.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in NPZ_ARRAYS}
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


def plain(array: np.ndarray) -> np.ndarray:
    """The array in a type that prepared files hold: float64 becomes float32."""
    return array.astype(np.float32) if array.dtype == np.float64 else array


def groups_of(prompts: np.ndarray | None, n: int, source: dict) -> np.ndarray:
    """Prompt numbers (n,) int64: equal for equal prompt embeddings (n, D'), in every file.

    Where `prompts` is None the numbers all differ, from each other and from those of other sources.
    """
    if prompts is None:
        return attribute_data.groups_of([f"{artifacts.hash_of(source)} {i}" for i in range(n)])
    # Adding 0 turns -0.0 into 0.0, which is equal but has other bytes.
    return attribute_data.groups_of(
        [(np.asarray(row, np.float32) + 0).tobytes().hex() for row in prompts]
    )


# ---------------------------------------------------------------------------------------- selection


def in_half(groups: np.ndarray, half: str, share: float, seed: int) -> np.ndarray:
    """(n,) bool: whether the prompt of each row belongs to the `half` "first" or "second".

    groups: (n,) prompt numbers; share: expected share of the prompts in the first half. The half of
    a prompt depends on its number and the seed alone, so that all files are divided alike.
    """
    threshold = int(share * 2**64)
    salt = seeds.rng(seed, "halves of the prompts").bytes(16)
    digests = [
        hashlib.sha256(salt + int(group).to_bytes(8, "little")).digest()[:8] for group in groups
    ]
    is_first = np.array([int.from_bytes(digest, "little") < threshold for digest in digests])
    return is_first if half == "first" else ~is_first


def take(rated: Rated, rows: np.ndarray) -> Rated:
    """`rated` with these rows alone, copied in the type in which they are stored."""
    prompts = rated.prompt_embeddings
    return replace(
        rated,
        embeddings=[gather(rated.embeddings, rows)],
        prompt_embeddings=None if prompts is None else [gather(prompts, rows)],
        groups=rated.groups[rows],
        ids=[rated.ids[i] for i in rows],
        labels=None if rated.labels is None else rated.labels[rows],
        subsets=None if rated.subsets is None else [rated.subsets[i] for i in rows],
    )


def gather(parts: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Rows of the concatenation of `parts`, in their type."""
    return attribute_data.gather(parts, rows, parts[0].dtype)


def choose(rated: Rated, attributes: list[str]) -> Rated:
    """`rated` with the labels of these attributes alone, in this order."""
    columns = [rated.column(name) for name in attributes]
    return replace(rated, attributes=list(attributes), labels=rated.labels[:, columns])


# -------------------------------------------------------------------------------------------- pairs


def pairs_of(
    rated: Rated, attribute: str, concepts: list[str], min_gap: float, n_pairs: int, seed: int
) -> tuple[Rated, dict[str, int]]:
    """(pairs, counts): pairs of responses to one prompt, the one with more of `attribute` chosen.

    concepts: attributes whose labels the pairs get: 1 where the chosen response has more of the
    attribute, 0 where it has less, 0.5 where both are equal, NaN where a label is missing; min_gap:
    the labels of a pair differ by more than this; n_pairs: largest number of pairs of a prompt,
    drawn without replacement. counts: prompts, prompts without a pair, and possible pairs that were
    left out because of their gap. InputError where there is no pair.
    """
    label = rated.labels[:, rated.column(attribute)].astype(float)
    rows, counts = _draw_pairs(label, rated.groups, min_gap, n_pairs, seed)
    if not rows:
        raise InputError(
            f"--pairs_from {attribute}: no responses to one prompt whose labels differ by more "
            f"than {min_gap}; lower --min_gap"
        )
    rows = np.concatenate(rows)
    chosen, rejected = rows.T
    prompts = rated.prompt_embeddings
    labels = rated.labels[:, [rated.column(name) for name in concepts]]
    difference = labels[chosen] - labels[rejected]
    pairs = Rated(
        embeddings=[np.stack([gather(rated.embeddings, side) for side in rows.T], 1)],
        prompt_embeddings=None if prompts is None else [gather(prompts, chosen)],
        groups=rated.groups[chosen],
        ids=[f"{rated.ids[a]} over {rated.ids[b]}" for a, b in rows],
        labels=np.float32(0.5) + np.sign(difference) / 2 if concepts else None,
        attributes=list(concepts),
        subsets=None if rated.subsets is None else [rated.subsets[a] for a in chosen],
        source=rated.source,
        left_out=rated.left_out,
    )
    return pairs, counts


def _draw_pairs(label, groups, min_gap, n_pairs, seed):
    """([row numbers (m, 2) of each prompt, chosen then rejected], counts as in `pairs_of`)."""
    order = np.argsort(groups, kind="stable")
    rows_by_prompt = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    counts = {
        "prompts": len(rows_by_prompt),
        "prompts_without_a_pair": 0,
        "pairs_of_too_small_a_gap": 0,
    }
    pairs = []
    for rows in rows_by_prompt:
        rows = rows[np.isfinite(label[rows])]
        first, second = (rows[side] for side in np.triu_indices(len(rows), 1))
        gap = label[first] - label[second]
        clear = np.flatnonzero(np.abs(gap) > min_gap)
        counts["pairs_of_too_small_a_gap"] += len(gap) - len(clear)
        if not len(clear):
            counts["prompts_without_a_pair"] += 1
            continue
        # A random stream for each prompt: its pairs do not depend on the other prompts of the file.
        rng = seeds.rng(seed, "pairs of a prompt", int(groups[rows[0]]))
        drawn = np.sort(rng.permutation(clear)[:n_pairs])
        sides = (first[drawn], second[drawn])
        pairs.append(np.where(gap[drawn] > 0, sides, sides[::-1]).T)
    return pairs, counts
