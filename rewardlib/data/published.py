"""Published embedding files: how they are named, found and read, and which of their axes is which.

Three formats of file names, embeddings first, then rewards:
    1  EMBD_{dataset}_{embed}_{gen}_{split}.npy               (K, N, D)
       REWARD_{dataset}_{rm}_{gen}_{split}.npy                (K, N)
    2  EMBD-{SPLIT}-embd_model_name_{embed}_dataset_orig_...  (K, N, D)
       REWARD-{SPLIT}-... of the same name, or, in short,
       REWARD-{SPLIT}-{task}{-sft_obj}-{gen}.npy              (K, N)
    3  embd_{gen}_{embed}_{task}_{split}.npy                  (N, K, D)
       reward_{gen}_{embed}_{task}_{split}.npy                (N, K, 1)

convert_embeddings.py and rewardlib.api.load_embd_data read these files. Each caller passes a dict
`words`: for every key, the phrase in which an error message names the argument to set. The keys are
"folder", "narrower", "files", "names", "dataset", "reward_model" and "axes"; the phrases of the
last three have a placeholder for the value.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np

from rewardlib.data.embeddings import DTYPES
from rewardlib.errors import InputError

_LONG = (
    "{split}-embd_model_name_{embed}_dataset_orig_{dataset}_gen_pref_model_name_{gen}"
    "_golden_rm_name_{rm}.npy"
)
# number: (name of the embedding file, names of the reward file with the preferred name first)
FORMATS = {
    1: ("EMBD_{dataset}_{embed}_{gen}_{split}.npy", ["REWARD_{dataset}_{rm}_{gen}_{split}.npy"]),
    2: ("EMBD-" + _LONG, ["REWARD-" + _LONG, "REWARD-{split}-{short}.npy"]),
    3: ("embd_{gen}_{embed}_{task}_{split}.npy", ["reward_{gen}_{embed}_{task}_{split}.npy"]),
}
REWARD_AXES = {1: "KN", 2: "KN", 3: "NK"}  # as each format documents them
SAME_MODEL = ("llama38b", "llama3-8b")  # two names of one model
TASKS = ("helpful", "harmless")


@dataclass(frozen=True)
class Source:
    """The two files of one split in a published format.

    format: number in FORMATS, None for a name of no format; axes: "KND" or "NKD", the order in the
    embedding file; reward_axes: "KN" or "NK", the order in the reward file; shape: (K, N, D),
    whatever the order in the file; dtype: of the embeddings.
    """

    embedding: Path
    reward: Path
    format: int | None
    axes: str
    reward_axes: str
    shape: tuple[int, int, int]
    dtype: np.dtype


# -------------------------------------------------------------------------------------------- names


def names(
    task: str,
    dataset: str | None,
    sft_obj: str,
    embed_model: str,
    gen_model: str,
    reward_model: str | None = None,
) -> dict:
    """The values of the {fields} in the file names to search for: a query for `find`.

    sft_obj: the data of the supervised fine-tuning, "none" or "" where the file names have no such
    suffix; dataset None: hh-rlhf-{task}-{sft_obj}, for a task in TASKS; reward_model None: any.

    Format 3 and the short reward name of format 2 tell data sets apart by the task alone. If
    `dataset` is not a data set of this task, these names must therefore hold the data set in place
    of the task; otherwise files of another data set would fit.
    """
    sft = "" if sft_obj in ("", "none") else "-" + sft_obj.lstrip("-")
    if dataset is None and task.lower() not in TASKS:
        raise InputError(
            f"task {task}: this task needs a dataset as well; give the name used in the files"
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


def embedding_files(
    files: list[Path], split: str, *queries: dict
) -> dict[Path, tuple[int, dict, dict]]:
    """The embedding files of `split` ("train" or "test") that fit any of the queries.

    A query is what `names` returns; it may hold the key "formats", the numbers of the formats to
    search. Returns {path: (format number, {field: value}, the query that fits)}.
    """
    matches = {}
    for query in queries:
        for number in query.get("formats", FORMATS):
            for path, fields in _matches(files, FORMATS[number][0], split, query):
                matches.setdefault(path, (number, fields, query))
    return matches


def find(
    files: list[Path], folder: Path | str, split: str, *queries: dict, words: dict
) -> tuple[Path, Path] | None:
    """The (embedding, reward) paths of `split` ("train" or "test") that fit any of the queries.

    files: the files of `folder`, see `files_in`; queries: see `embedding_files`. Returns None if no
    embedding file fits. Raises InputError if several fit, or if the reward file is missing.
    """
    matches = embedding_files(files, split, *queries)
    if not matches:
        return None
    candidates = [(path, fields) for path, (_, fields, _) in matches.items()]
    embedding, fields = _only(candidates, folder, f"{split} embedding", words)
    number, _, query = matches[embedding]
    query = {**query, "rm": fields.get("rm", query["rm"])}
    templates = FORMATS[number][1]
    for template in templates:
        if rewards := _matches(files, template, split, query):
            return embedding, _only(rewards, folder, f"{split} reward", words)[0]
    what_for = f" for {embedding.name}"
    raise not_found(
        files, folder, split, query, templates=templates, what_for=what_for, words=words
    )


def not_found(
    files: list[Path],
    folder: Path | str,
    split: str,
    *queries: dict,
    templates: list[str] | None = None,
    what_for: str = "",
    words: dict,
) -> InputError:
    """InputError that lists the names that were searched for and the most similar files.

    templates: names of the missing reward file, None where the embedding file is missing.
    """
    kind, prefix = ("reward", "reward") if templates else ("embedding", "embd")
    missing = []
    for query in queries:
        for template in templates or [FORMATS[i][0] for i in query.get("formats", FORMATS)]:
            name = _readable(template, split, query)
            if name not in missing:
                missing.append(name)

    def likeness(name):
        return max(
            difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio() for other in missing
        )

    others = {path.name for path in files if path.name.lower().startswith(prefix)}
    similar = sorted(sorted(others), key=likeness, reverse=True)[:4]
    found = f"similar: {', '.join(similar)}" if similar else f"no {kind} file at all"
    return InputError(
        f"{folder}: expected a {split} {kind} file{what_for} named {' or '.join(missing)}, "
        f"found {found}; set {words['names']}, or give {words['files']}"
    )


def files_in(folder: Path | str, words: dict) -> list[Path]:
    """The .npy files of `folder` and its sub-folders, sorted; InputError without that folder."""
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder}: no such folder of published embedding files; check {words['folder']}"
        )
    return sorted(
        path
        for path in Path(folder).rglob("*")
        if path.name.lower().endswith(".npy") and path.is_file()
    )


def read_name(path: Path | str) -> tuple[int | None, dict]:
    """(format number, {field: value}) of a published file name; (None, {}) for any other name."""
    fields = ("dataset", "embed", "gen", "task", "rm", "short")
    expressions = {**dict.fromkeys(fields, "[^_]+"), "split": "(?i:train|test)"}
    for number, (embedding, rewards) in FORMATS.items():
        for template in (embedding, *rewards):
            if match := re.fullmatch(_pattern(template, expressions), Path(path).name):
                return number, {field: _plain(value) for field, value in match.groupdict().items()}
    return None, {}


def _plain(value):
    """The value of a field in lower case, with the first of SAME_MODEL for either."""
    return SAME_MODEL[0] if value.lower() in SAME_MODEL else value.lower()


def _pattern(template, expressions):
    """Regular expression for a template, with expressions {field: regular expression} filled in."""
    parts = Formatter().parse(template)
    return "".join(
        re.escape(text) + (f"(?P<{field}>{expressions[field]})" if field else "")
        for text, field, *_ in parts
    )


def _matches(files, template, split, query):
    """[(path, {field: value})] of the files named by `template` and `query`, in any case."""
    expressions = {
        field: _expression(value) for field, value in query.items() if value and field != "formats"
    }
    expressions["short"] = _expression(query["task"] + query["sft"]) + "-" + expressions["gen"]
    pattern = _pattern(template, {"rm": "[^_]+", "split": split, **expressions})
    pattern = re.compile(pattern, re.IGNORECASE)
    matches = ((path, pattern.fullmatch(path.name)) for path in files)
    return [(path, match.groupdict()) for path, match in matches if match]


def _expression(value):
    """Regular expression for the value of a field; either of SAME_MODEL stands for both."""
    if value.lower() in SAME_MODEL:
        return f"(?:{'|'.join(map(re.escape, SAME_MODEL))})"
    return re.escape(value)


def _readable(template, split, query):
    """The file name that `template` and `query` ask for, with * for any reward model."""
    fields = {**query, "split": split.upper() if "-{split}-" in template else split}
    fields["rm"] = query["rm"] or "*"
    fields["short"] = f"{query['task']}{query['sft']}-{query['gen']}"
    return template.format_map(fields)


def _only(candidates, folder, kind, words):
    """The only (path, {field: value}) of `candidates`; InputError if there are several.

    The error names the setting that tells the candidates apart.
    """
    if len(candidates) == 1:
        return candidates[0]
    ways = [words["narrower"]]
    for setting, field in (("dataset", "dataset"), ("reward_model", "rm")):
        values = {fields.get(field) for _, fields in candidates} - {None}
        if len(values) == len(candidates):
            ways = [words[setting].format("|".join(sorted(values)))]
    raise InputError(
        f"{folder}: expected one {kind} file, found {len(candidates)}: "
        f"{', '.join(str(path.relative_to(folder)) for path, _ in candidates)}; "
        f"choose with {', or with '.join(dict.fromkeys([*ways, words['files']]))}"
    )


# ------------------------------------------------------------------------------------------- arrays


def open_source(embedding: Path | str, reward: Path | str, axes: str, words: dict) -> Source:
    """The Source of an embedding and a reward file, after checking headers and settling axes.

    axes: see `settle_axes`. Raises InputError for files that do not belong together, or for arrays
    of other shapes or dtypes.
    """
    (number, fields), (reward_number, reward_fields) = read_name(embedding), read_name(reward)
    for field in ("split", "dataset", "gen"):
        if field in fields and field in reward_fields and fields[field] != reward_fields[field]:
            raise InputError(
                f"{reward}: expected the rewards of {field} {fields[field]} as in "
                f"{Path(embedding).name}, found {reward_fields[field]}; give the reward file of "
                "these embeddings (or rename the file if its name is wrong)"
            )
    array, rewards = open_array(embedding), open_array(reward)
    if array.ndim != 3 or array.dtype.name not in DTYPES:
        raise InputError(
            f"{embedding}: expected (responses, prompts, dimensions) of {' / '.join(DTYPES)}, "
            f"found {array.shape} of {array.dtype.name}"
        )
    if rewards.dtype.kind not in "fiu":
        raise InputError(f"{reward}: expected numbers, found {rewards.dtype.name}")
    where = f"{embedding} with {Path(reward).name}"
    axes, reward_axes = settle_axes(
        array.shape, rewards.shape, reward_number or number, axes, where, words
    )
    n, k = (array.shape[axes.index(axis)] for axis in "NK")
    return Source(
        embedding=Path(embedding),
        reward=Path(reward),
        format=number,
        axes=axes,
        reward_axes=reward_axes,
        shape=(k, n, array.shape[2]),
        dtype=array.dtype,
    )


def settle_axes(
    embedding_shape: tuple[int, ...],
    reward_shape: tuple[int, ...],
    number: int | None,
    axes: str,
    where: str,
    words: dict,
) -> tuple[str, str]:
    """The axis orders: "KND" or "NKD" of the embeddings, and "KN" or "NK" of the rewards.

    number: the format, None for a name of no format; axes: "KND" or "NKD" if the user gave the
    order of the embeddings, else "auto"; where: the files, for error messages.

    The two axes of the rewards must equal the first two of the embeddings, in this order or
    swapped, which ties the axes of both files together. Two sources document which axis is K: the
    number of axes of the rewards (two: (K, N), three: (N, K, 1)) and the format (1 and 2: K first,
    3: N first). Both are known to be wrong at times, so a documented order is believed only if it
    makes K the smaller number. If neither does, or if K = N, the files cannot settle the order:
    InputError, unless `axes` does. If K = N, `axes` holds for both files.
    """
    reward_pair, embedding_pair = tuple(reward_shape[:2]), tuple(embedding_shape[:2])
    one_reward_each = len(reward_shape) in (2, 3) and tuple(reward_shape[2:]) in ((), (1,))
    if not one_reward_each or embedding_pair not in (reward_pair, reward_pair[::-1]):
        raise InputError(
            f"{where}: expected one reward for each embedding, found rewards {reward_shape} and "
            f"embeddings {embedding_shape}; the first two axes must agree, in either order"
        )
    documented = {"KN" if len(reward_shape) == 2 else "NK", REWARD_AXES.get(number)}
    likely = "KN" if reward_pair[0] < reward_pair[1] else "NK"
    a, b = embedding_pair
    knd, nkd = (words["axes"].format(order) for order in ("KND", "NKD"))
    if axes == "auto" and a == b:
        raise InputError(
            f"{where}: both axis orders fit embeddings {embedding_shape}; give {knd} or {nkd}"
        )
    if axes == "auto" and likely not in documented:
        fewer, more = sorted(reward_pair)
        raise InputError(
            f"{where}: the documented order makes {more} responses to each of {fewer} prompts of "
            f"embeddings {embedding_shape} and rewards {reward_shape}, the other order {fewer} to "
            f"each of {more}; give {knd} ({a} responses, {b} prompts) or {nkd} ({b} responses, "
            f"{a} prompts)"
        )
    same_order = embedding_pair == reward_pair
    if axes == "auto":
        return ("KND" if (likely == "KN") == same_order else "NKD"), likely
    return axes, (axes[:2] if same_order else axes[1::-1])


def open_array(path: Path | str) -> np.memmap:
    """Memory-map an .npy file after checking its header against its size; InputError if wrong."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such .npy file; check the path") from None
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: expected a whole .npy file of numbers ({reason}); download it again"
        ) from None
    if not isinstance(array, np.memmap):
        raise InputError(f"{path}: expected an .npy file, found an archive; unpack it first")
    expected, actual = array.offset + array.nbytes, Path(path).stat().st_size
    if actual != expected:
        raise InputError(
            f"{path}: expected {expected} bytes by its header, found {actual}; download it again"
        )
    return array


def fingerprint(path: Path) -> dict:
    """The identity of a published file without its data: name, size, time of change, header."""
    array, status = open_array(path), path.stat()
    header = [list(array.shape), array.dtype.str, bool(array.flags.c_contiguous)]
    return {
        "name": path.name,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "header": header,
    }


def read_block(
    path: Path, axes: str, responses: slice, prompts: slice, dtype: np.dtype | type
) -> np.ndarray:
    """Copy of a part of a published array, (k, n, D) of `dtype`; a reward array counts as D = 1.

    axes: order in the file, beginning with "KN" or "NK". Raises InputError for a value that is not
    finite, or that `dtype` cannot hold.
    """
    # mapped anew for each block, so that the pages read so far do not add up in memory
    array = open_array(path)
    array = array.reshape(*array.shape[:2], -1)
    source_knD = (array if axes[0] == "K" else array.swapaxes(0, 1))[responses, prompts]
    with np.errstate(over="ignore"):
        block_knD = np.array(source_knD, dtype=dtype, order="C")
    finite = np.isfinite(block_knD)
    if not finite.all():
        position = np.unravel_index(np.argmin(finite), finite.shape)
        k, n = responses.start + position[0], prompts.start + position[1]
        value = source_knD[position]
        where = f"{path}, response {k} of prompt {n}"
        if block_knD.shape[2] > 1:
            where += f", dimension {position[2]}"
        if np.isfinite(value):
            raise InputError(
                f"{where}: {value} does not fit {np.dtype(dtype).name}; choose a wider dtype"
            )
        raise InputError(
            f"{where}: expected a finite number, found {value}; embed or score that response again"
        )
    return block_knD
