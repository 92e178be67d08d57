"""Checks before step 1 of what steps 1 to 4 need: packages, models, prompts, memory and disk."""

import importlib.metadata
import os
import shutil
from pathlib import Path

import torch

from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts, staging

PACKAGES = ("transformers", "peft", "trl", "datasets", "accelerate")
HIDDEN_SIZE = 2048  # assumed of an embedder whose configuration does not tell
WEIGHTS = (".safetensors", ".bin")


def check(
    models: dict[str, str],
    dataset: str,
    eval_dataset: str,
    data_dir: str,
    adapter_name: str,
    n_responses: dict[str, int],
    max_prompts: int | None,
    folder: str | Path,
) -> None:
    """Print the size of the run; raise one InputError that names everything that is missing.

    models: names by role, "generator", "reward" and "embedder". n_responses: K of the splits
    "train" and "test". max_prompts: prompts per split; None: all. folder: on the disk to write to.
    """
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing:
        raise InputError(
            f"missing packages: {', '.join(missing)}; "
            'pip install -c constraints.txt -e ".[llm]" (on a GPU: ".[gpu]")'
        )
    problems, weights, cached, hidden = [], {}, {}, HIDDEN_SIZE
    for role, name in models.items():
        try:
            weights[role], cached[role], size = _model(name)
            hidden = size if role == "embedder" and size else hidden
        except InputError as error:
            problems.append(f"{role}: {error}")
    n_prompts = {}
    try:
        if adapter_name == "sft":
            prompts.read_examples(dataset, data_dir)
        for split in n_responses:
            available = len(prompts.read_prompts(eval_dataset, split, data_dir))
            n_prompts[split] = min(available, max_prompts or available)
    except InputError as error:
        problems.append(str(error))
    rows = sum(n * n_responses[split] for split, n in n_prompts.items())
    problems += _memory(models, weights)
    needed = _disk_bytes(rows, hidden, weights, cached)
    free = shutil.disk_usage(folder).free
    if needed > free:
        problems.append(
            f"disk: expected {needed / 1e9:.1f} GB of free space for {rows} responses, "
            f"found {free / 1e9:.1f} GB"
        )
    if problems:
        raise InputError("before the first step: " + "; and ".join(problems))
    sizes = ", ".join(
        f"{n_responses[split]} responses to each of {n} {split} prompts"
        for split, n in n_prompts.items()
    )
    print(f"steps 1 to 4 on {_device_name()}: {sizes}; about {needed / 1e9:.2f} GB of disk")


def _is_installed(name):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _model(name):
    """(bytes of the weights, whether they are on this machine, hidden size or None) of a model.

    InputError when the model is absent or access to it is refused.
    """
    from transformers import AutoConfig

    full = loading.full_name(name)
    with loading.fetching(full, "a local folder or a model on the hub"):
        config = AutoConfig.from_pretrained(full)
        hidden = getattr(config.get_text_config(), "hidden_size", None)
        if Path(full).is_dir():
            return _weight_bytes(_sizes_in(Path(full))), True, hidden
        import huggingface_hub

        if os.environ.get("HF_HUB_OFFLINE") == "1":
            folder = Path(huggingface_hub.snapshot_download(full, local_files_only=True))
            return _weight_bytes(_sizes_in(folder)), True, hidden
        siblings = huggingface_hub.HfApi().model_info(full, files_metadata=True).siblings
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
        cached_paths = [
            huggingface_hub.try_to_load_from_cache(full, file)
            for file in sizes
            if file.endswith(WEIGHTS)
        ]
        # try_to_load_from_cache returns a path, None, or a marker for a file known to be absent
        return _weight_bytes(sizes), all(isinstance(path, str) for path in cached_paths), hidden


def _sizes_in(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def _weight_bytes(sizes):
    """Bytes of the safetensors files, or of the .bin files where there are no safetensors files."""
    totals = (sum(n for name, n in sizes.items() if name.endswith(end)) for end in WEIGHTS)
    return next(filter(None, totals), 0)


def _disk_bytes(rows, hidden, weights, cached):
    """Bytes of `rows` responses, each a float32 embedding and texts, and of weights to download."""
    downloads = sum(size for role, size in weights.items() if not cached[role])
    return rows * (4 * hidden + 4 * staging.TEXT_BYTES) + downloads


def _memory(models, weights):
    """A line for each model whose weights, and a fifth more for activations, exceed the memory."""
    if torch.cuda.is_available():
        total, kind = torch.cuda.mem_get_info()[1] * torch.cuda.device_count(), "GPU memory"
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        kind = "memory (no GPU was found)"
    return [
        f"{role} {models[role]}: expected {1.2 * size / 1e9:.1f} GB of {kind}, "
        f"found {total / 1e9:.1f} GB"
        for role, size in weights.items()
        if 1.2 * size > total
    ]


def _device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "the CPU (no GPU was found)"
