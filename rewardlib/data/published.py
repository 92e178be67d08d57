"""Published embedding files: how they are named, found and read, and which of their axes is which.

    1  EMBD_{dataset}_{embed}_{gen}_{split}.npy (K, N, D)         REWARD_{dataset}_{rm}_{gen}_{split}.npy (K, N)
    2  EMBD-{SPLIT}-embd_model_name_{embed}_dataset_orig_...      REWARD-{SPLIT}-... of the same name, or the short
       (K, N, D)                                                  REWARD-{SPLIT}-{task}{-sft_obj}-{gen}.npy (K, N)
    3  embd_{gen}_{embed}_{task}_{split}.npy (N, K, D)            reward_{gen}_{embed}_{task}_{split}.npy (N, K, 1)

Knows arrays and files; convert_embeddings.py is the command, notebook.load_embd_data the call. Each
says in its own `words` what an error asks for.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np

from rewardlib.data.embeddings import DTYPES
from rewardlib.errors import InputError

_LONG = "{split}-embd_model_name_{embed}_dataset_orig_{dataset}_gen_pref_model_name_{gen}_golden_rm_name_{rm}.npy"
FORMATS = {  # number: (name of the embedding file, names of the reward file with the preferred one first)
    1: ("EMBD_{dataset}_{embed}_{gen}_{split}.npy", ["REWARD_{dataset}_{rm}_{gen}_{split}.npy"]),
    2: ("EMBD-" + _LONG, ["REWARD-" + _LONG, "REWARD-{split}-{short}.npy"]),
    3: ("embd_{gen}_{embed}_{task}_{split}.npy", ["reward_{gen}_{embed}_{task}_{split}.npy"]),
}
REWARD_AXES = {1: "KN", 2: "KN", 3: "NK"}
SAME_MODEL = ("llama38b", "llama3-8b")
TASKS = ("helpful", "harmless")
COMMAND = {  # what settles a doubt, as the command line calls it
    "folder": "--embd_dir",
    "narrower": "a narrower --embd_dir",
    "files": "--embd_file and --reward_file",
    "names": "--dataset, --task, --embed_model, --gen_model",
    "dataset": "--dataset {}",
    "reward_model": "--reward_model {}",
    "axes": "--axes {}",
}


@dataclass(frozen=True)
class Source:
    """One split in published form. shape is (K, N, D); axes ("KND" or "NKD") and reward_axes are those of the files."""

    embedding: Path
    reward: Path
    format: int | None
    axes: str
    reward_axes: str
    shape: tuple
    dtype: np.dtype


# -------------------------------------------------------------------------------------------- names


def names(task, dataset, sft_obj, embed_model, gen_model, reward_model=None):
    """What fills the {fields} of the file names; the reward model may be None: any.

    Format 3 and the short reward name tell data sets apart by the task alone. Where `dataset` is
    not one of the task's, they must carry its name instead, lest another data set's files are taken
    for it.
    """
    sft = "" if sft_obj in ("", "none") else "-" + sft_obj.lstrip("-")
    if dataset is None and task.lower() not in TASKS:
        raise InputError(
            f"--task {task}: expected --dataset beside it, found none; give the name used in the files"
        )
    if dataset is None:
        dataset = f"hh-rlhf-{task}{sft}"
    if task.lower() not in dataset.lower():
        task = dataset
    if task == dataset or not dataset.lower().endswith(sft.lower()):
        sft = ""
    return {
        "dataset": dataset,
        "embed": embed_model,
        "gen": gen_model,
        "task": task,
        "sft": sft,
        "rm": reward_model,
    }


def embedding_files(files, split, *wanted):
    """The embedding files of `split` ("train" or "test") that any of the names(...) `wanted` fits.

    Returns {path: (format number, {field: value}, the names that fit)}. Names may hold "formats",
    the numbers of those that they are for.
    """
    found = {}
    for names in wanted:
        for number in names.get("formats", FORMATS):
            for path, fields in _matches(files, FORMATS[number][0], split, names):
                found.setdefault(path, (number, fields, names))
    return found


def find(files, folder, split, *wanted, words=COMMAND):
    """The (embedding, reward) paths of `split` ("train" or "test") among `files` of `folder`, for names(...) `wanted`.

    Returns None where there is no embedding file; InputError where several fit or the reward file
    is missing.
    """
    found = embedding_files(files, split, *wanted)
    if not found:
        return None
    fitting = [(path, fields) for path, (_, fields, _) in found.items()]
    embedding, fields = _only(fitting, folder, f"{split} embedding", words)
    number, _, names = found[embedding]
    names = {**names, "rm": fields.get("rm", names["rm"])}
    for template in FORMATS[number][1]:
        if rewards := _matches(files, template, split, names):
            return embedding, _only(rewards, folder, f"{split} reward", words)[0]
    templates, what_for = FORMATS[number][1], f" for {embedding.name}"
    raise not_found(
        files, folder, split, names, templates=templates, what_for=what_for, words=words
    )


def not_found(files, folder, split, *wanted, templates=None, what_for="", words=COMMAND):
    """InputError saying which names were looked for and which similar files there are."""
    kind = "reward" if templates else "embedding"
    looked_for = []
    for names in wanted:
        parts = templates or [FORMATS[number][0] for number in names.get("formats", FORMATS)]
        looked_for += [
            name for part in parts if (name := _readable(part, split, names)) not in looked_for
        ]
    others = {
        path.name
        for path in files
        if path.name.lower().startswith("reward" if kind == "reward" else "embd")
    }

    def likeness(name):
        return max(
            difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()
            for other in looked_for
        )

    similar = sorted(sorted(others), key=likeness, reverse=True)[:4]
    return InputError(
        f"{folder}: expected a {split} {kind} file{what_for} named {' or '.join(looked_for)}, found "
        f"{'similar: ' + ', '.join(similar) if similar else f'no {kind} file at all'}; "
        f"set {words['names']}, or give {words['files']}"
    )


def files_in(folder, words=COMMAND):
    """The .npy files of `folder` and its sub-folders, in one fixed order."""
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder}: expected a folder with published embedding files, found none; check {words['folder']}"
        )
    return sorted(
        path
        for path in Path(folder).rglob("*")
        if path.name.lower().endswith(".npy") and path.is_file()
    )


def read_name(path):
    """(format number, {field: value}) of a published file name, (None, {}) of any other name."""
    anything = dict.fromkeys(("dataset", "embed", "gen", "task", "rm", "short"), "[^_]+")
    for number, (embedding, rewards) in FORMATS.items():
        for template in (embedding, *rewards):
            if match := re.fullmatch(
                _pattern(template, {**anything, "split": "(?i:train|test)"}), Path(path).name
            ):
                return number, {field: _plain(value) for field, value in match.groupdict().items()}
    return None, {}


def _plain(value):
    return SAME_MODEL[0] if value.lower() in SAME_MODEL else value.lower()


def _pattern(template, fields):
    parts = Formatter().parse(template)
    return "".join(
        re.escape(text) + (f"(?P<{field}>{fields[field]})" if field else "")
        for text, field, *_ in parts
    )


def _matches(files, template, split, wanted):
    """[(path, {field: value})] of the files that `template` names, case aside."""
    fields = {
        field: _expression(value) for field, value in wanted.items() if value and field != "formats"
    }
    fields["short"] = _expression(wanted["task"] + wanted["sft"]) + "-" + fields["gen"]
    pattern = re.compile(
        _pattern(template, {"rm": "[^_]+", "split": split, **fields}), re.IGNORECASE
    )
    hits = ((path, pattern.fullmatch(path.name)) for path in files)
    return [(path, match.groupdict()) for path, match in hits if match]


def _expression(value):
    return (
        f"(?:{'|'.join(map(re.escape, SAME_MODEL))})"
        if value.lower() in SAME_MODEL
        else re.escape(value)
    )


def _readable(template, split, wanted):
    shown = {**wanted, "split": split.upper() if "-{split}-" in template else split}
    shown["rm"] = wanted["rm"] or "*"
    shown["short"] = f"{wanted['task']}{wanted['sft']}-{wanted['gen']}"
    return template.format_map(shown)


def _only(found, folder, kind, words):
    """The one (path, {field: value}) of `found`; InputError that says what tells them apart where there are several."""
    if len(found) == 1:
        return found[0]
    ways = [words["narrower"]]
    for setting, field in (("dataset", "dataset"), ("reward_model", "rm")):
        values = {fields.get(field) for _, fields in found} - {None}
        if len(values) == len(found):
            ways = [words[setting].format("|".join(sorted(values)))]
    raise InputError(
        f"{folder}: expected one {kind} file, found {len(found)}: "
        f"{', '.join(str(path.relative_to(folder)) for path, _ in found)}; "
        f"choose with {', or with '.join(dict.fromkeys([*ways, words['files']]))}"
    )


# ------------------------------------------------------------------------------------------- arrays


def open_source(embedding, reward, axes="auto", words=COMMAND):
    """Check the headers of an embedding and a reward file and settle their axes. Returns a Source."""
    (number, told), (reward_number, reward_told) = read_name(embedding), read_name(reward)
    for field in ("split", "dataset", "gen"):
        if field in told and field in reward_told and told[field] != reward_told[field]:
            raise InputError(
                f"{reward}: expected the rewards of {field} {told[field]} as in {Path(embedding).name}, found "
                f"{reward_told[field]}; give the file that belongs to it (or rename it if its name is wrong)"
            )
    array, rewards = open_array(embedding), open_array(reward)
    if array.ndim != 3 or array.dtype.name not in DTYPES:
        raise InputError(
            f"{embedding}: expected (responses, prompts, dimensions) of {' / '.join(DTYPES)}, found {array.shape} of "
            f"{array.dtype.name}"
        )
    if rewards.dtype.kind not in "fiu":
        raise InputError(f"{reward}: expected numbers, found {rewards.dtype.name}")
    where = f"{embedding} with {Path(reward).name}"
    axes, reward_axes = settle_axes(
        array.shape, rewards.shape, reward_number or number, axes, where, words
    )
    n, k = (array.shape[axes.index(axis)] for axis in "NK")
    return Source(
        Path(embedding),
        Path(reward),
        number,
        axes,
        reward_axes,
        (k, n, array.shape[2]),
        array.dtype,
    )


def settle_axes(embedding, reward, number, axes, where, words=COMMAND):
    """Which axis is K and which is N: ("KND" or "NKD" of the embeddings, "KN" or "NK" of the rewards).

    The rewards' two axes must equal the embeddings' first two, straight or swapped; that ties one
    file to the other. Which of the two is K is documented twice, by shape (two axes: (K, N), three:
    (N, K, 1)) and by format `number` (1 and 2: K first, 3: N first; None for a name of no format).
    As both are known to be wrong at times, a documented reading is believed where it makes K the
    smaller number. Where it does not, or K = N, the files cannot say: InputError, unless `axes`
    ("KND" or "NKD", else "auto") tells the order of the embeddings. With K = N, `axes` holds for
    both files. `embedding` and `reward` are shapes.
    """
    pair, first = tuple(reward[:2]), tuple(embedding[:2])
    if (
        len(reward) not in (2, 3)
        or tuple(reward[2:]) not in ((), (1,))
        or first not in (pair, pair[::-1])
    ):
        raise InputError(
            f"{where}: expected one reward for each embedding, found rewards {reward} and embeddings {embedding}; "
            "the first two axes must agree, straight or swapped"
        )
    documented = {"KN" if len(reward) == 2 else "NK", REWARD_AXES.get(number)}
    likely = "KN" if pair[0] < pair[1] else "NK"
    a, b = first
    knd, nkd = (words["axes"].format(order) for order in ("KND", "NKD"))
    if axes == "auto" and a == b:
        raise InputError(
            f"{where}: both axis orders fit embeddings {embedding}; give {knd} or {nkd}"
        )
    if axes == "auto" and likely not in documented:
        raise InputError(
            f"{where}: the documented order makes {max(pair)} responses to each of {min(pair)} prompts of embeddings "
            f"{embedding} and rewards {reward}, the other order {min(pair)} to each of {max(pair)}; "
            f"give {knd} ({a} responses, {b} prompts) or {nkd} ({b} responses, {a} prompts)"
        )
    if axes == "auto":
        return ("KND" if (likely == "KN") == (first == pair) else "NKD"), likely
    return axes, (axes[:2] if first == pair else axes[1::-1])


def open_array(path):
    """Memory-map an .npy file after checking its header against its size."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: expected an .npy file, found none; check the path") from None
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: expected a whole .npy file of numbers ({reason}); download it again"
        ) from None
    if not isinstance(array, np.memmap):
        raise InputError(f"{path}: expected an .npy file, found an archive; unpack it first")
    end, found = array.offset + array.nbytes, Path(path).stat().st_size
    if found != end:
        raise InputError(
            f"{path}: expected {end} bytes by its header, found {found}; download it again"
        )
    return array


def fingerprint(path):
    """What tells one published file from another without reading it: name, size, modification time and header."""
    array, status = open_array(path), path.stat()
    header = [list(array.shape), array.dtype.str, bool(array.flags.c_contiguous)]
    return {
        "name": path.name,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "header": header,
    }


def read_block(path, axes, responses, prompts, dtype):
    """Copy the slices `responses` and `prompts` of a published array as (k, n, D) of `dtype`, checked to be finite.

    A reward array counts as D = 1. The file is mapped anew for each block, so that the pages read
    so far do not add up in the memory of the process.
    """
    array = open_array(path)
    array = array.reshape(*array.shape[:2], -1)
    source = (array if axes[0] == "K" else array.swapaxes(0, 1))[responses, prompts]
    with np.errstate(over="ignore"):
        block = np.array(source, dtype=dtype, order="C")
    finite = np.isfinite(block)
    if not finite.all():
        at = np.unravel_index(np.argmin(finite), finite.shape)
        k, n, value = responses.start + at[0], prompts.start + at[1], source[at]
        where = f"{path}, response {k} of prompt {n}" + (
            f", dimension {at[2]}" if block.shape[2] > 1 else ""
        )
        if np.isfinite(value):
            raise InputError(
                f"{where}: {value} does not fit {np.dtype(dtype).name}; choose a wider --dtype"
            )
        raise InputError(
            f"{where}: expected a finite number, found {value}; embed or score that response again"
        )
    return block
