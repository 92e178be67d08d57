"""What steps 1 to 4 need, checked before the first of them: packages, models, prompts, memory, disk."""

import importlib.metadata
import os
import shutil
from pathlib import Path

from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts

PACKAGES = ("transformers", "peft", "trl", "datasets", "accelerate")
TEXT_BYTES = 1000
WEIGHTS = (".safetensors", ".bin")


def check(models, dataset, eval_dataset, data_dir, adapter_name, n_responses, max_prompts, folder):
    """Print what the run will take; raise one InputError that names everything that is missing.

    models: {role: name} of generator, reward and embedder; n_responses: {"train": K, "test": K};
    max_prompts: or None.
    """
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing:
        raise InputError(
            f"expected the packages {', '.join(PACKAGES)}, found none of {', '.join(missing)}; "
            'pip install -c constraints.txt -e ".[llm]" (on a GPU: ".[gpu]")'
        )
    problems, weights, cached, hidden = [], {}, {}, 2048
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
            found = len(prompts.read_prompts(eval_dataset, split, data_dir))
            n_prompts[split] = min(found, max_prompts or found)
    except InputError as error:
        problems.append(str(error))
    problems += _memory(models, weights)
    rows = sum(n * n_responses[split] for split, n in n_prompts.items())
    needed = rows * (4 * hidden + 4 * TEXT_BYTES) + sum(
        size for role, size in weights.items() if not cached[role]
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        problems.append(
            f"disk: expected {needed / 1e9:.1f} GB free for {rows} responses, found {free / 1e9:.1f} GB"
        )
    if problems:
        raise InputError("before the first step: " + "; and ".join(problems))
    sizes = ", ".join(
        f"{n_responses[split]} responses to each of {n} {split} prompts"
        for split, n in n_prompts.items()
    )
    print(f"steps 1 to 4 on {_place()}: {sizes}; about {needed / 1e9:.2f} GB of disk")


def _is_installed(name):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _model(name):
    """(bytes of the weights, whether they are on this machine, hidden size) of a model; InputError without access."""
    from transformers import AutoConfig

    full = loading.full_name(name)
    with loading.fetching(full, "a local folder or a model on the hub"):
        config = AutoConfig.from_pretrained(full)
        hidden = getattr(config.get_text_config(), "hidden_size", None)
        if Path(full).is_dir():
            return (
                _weight_bytes((path.name, path.stat().st_size) for path in Path(full).iterdir()),
                True,
                hidden,
            )
        import huggingface_hub

        if os.environ.get("HF_HUB_OFFLINE") == "1":
            folder = Path(huggingface_hub.snapshot_download(full, local_files_only=True))
            return (
                _weight_bytes((path.name, path.stat().st_size) for path in folder.iterdir()),
                True,
                hidden,
            )
        told = huggingface_hub.HfApi().model_info(full, files_metadata=True).siblings
        files = [(one.rfilename, one.size or 0) for one in told]
        here = [
            huggingface_hub.try_to_load_from_cache(full, n) for n, _ in files if n.endswith(WEIGHTS)
        ]
        return _weight_bytes(files), all(isinstance(path, str) for path in here), hidden


def _weight_bytes(files):
    """Bytes of the safetensors files, or of the .bin files where there are none of the former."""
    files = list(files)
    return next(
        filter(None, (sum(size for name, size in files if name.endswith(end)) for end in WEIGHTS)),
        0,
    )


def _memory(models, weights):
    """A line for each model whose weights alone, with a fifth for the work, exceed the memory."""
    import torch

    if torch.cuda.is_available():
        total, kind = torch.cuda.mem_get_info()[1] * torch.cuda.device_count(), "GPU memory"
    else:
        total, kind = (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "memory (no GPU was found)",
        )
    return [
        f"{role} {models[role]}: expected {1.2 * size / 1e9:.1f} GB of {kind}, found {total / 1e9:.1f} GB"
        for role, size in weights.items()
        if 1.2 * size > total
    ]


def _place():
    import torch

    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU (no GPU was found)"
    )
