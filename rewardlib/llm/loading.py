"""Language models by name or folder: fingerprints, tokenizers and models, loaded with checks."""

import contextlib
import hashlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.llm.names import full_name

REWARD_MODELS = {"helpful": "rmmistral7b", "harmless": "rayharmless"}
SAMPLE_BYTES = 1 << 20


@contextlib.contextmanager
def fetching(name: str, expected: str) -> Iterator[None]:
    """Turn any error raised while `name` is read or downloaded into an InputError of one line.

    `expected` says what `name` should be. Out of memory is passed on, for `memory_of`.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise InputError(
            f"{name}: expected {expected}, found: {reason}; check the name, the access rights and "
            "the network (the same command resumes a download: finished files are kept)"
        ) from error


@contextlib.contextmanager
def memory_of(flags: str) -> Iterator[None]:
    """Turn CUDA out of memory into an InputError that names the `flags` to lower."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise InputError(
            f"CUDA out of memory; lower {flags}, and run the same command again"
        ) from error


def _is_out_of_memory(error):
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # vLLM reports a lack of memory in errors of other types
    text = str(error).lower()
    return (
        "cuda out of memory" in text
        or "free memory on device" in text
        or "memory for the cache blocks" in text
    )


def fingerprint(name: str) -> dict:
    """What distinguishes one version of a model from another.

    {file: digest} of a local folder; {"hub", "revision"} of a model on the hub. Raises InputError
    when the hub cannot be reached or does not have the model.
    """
    folder = Path(full_name(name))
    if not folder.is_dir():
        from transformers.utils import cached_file

        with fetching(full_name(name), "a local folder or a model on the hub"):
            # the cache keeps each revision in a folder that bears its hash
            config_path = Path(cached_file(full_name(name), "config.json"))
            return {"hub": full_name(name), "revision": config_path.parent.name}
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != artifacts.MANIFEST
    ]
    return {path.name: _digest_ends(path) for path in files}


def _digest_ends(path):
    """Digest of a file's size, first MB and last MB: weights of many GB are not read in full."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(f"{size} ".encode() + file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def device() -> str:
    """Name of the device to compute on: cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`; "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device() == "cuda" else torch.float32
    return getattr(torch, name)


def quiet() -> None:
    """Show transformers' progress bars on a terminal only, and drop its report on the weights.

    `load_model` makes a check of its own in place of that report.
    """
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_load_report)


def _is_not_load_report(record):
    return "LOAD REPORT" not in record.getMessage()


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a model, given by name or folder; InputError when it cannot be loaded."""
    from transformers import AutoTokenizer

    with fetching(full_name(name), "the tokenizer of a local folder or of a model on the hub"):
        return AutoTokenizer.from_pretrained(full_name(name), trust_remote_code=trust_remote_code)


def load_model(
    kind: str,
    name: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    adapter: Path | None = None,
):
    """A transformers model in evaluation mode on the device, with the LoRA `adapter` merged in.

    kind: "causal" (next tokens), "base" (hidden states) or "reward" (one score per text).
    Raises InputError when the model cannot be loaded, when the checkpoint lacks weights, which
    would be random, or when a reward model has more than one output.
    """
    import transformers

    quiet()
    auto_class = {
        "causal": transformers.AutoModelForCausalLM,
        "base": transformers.AutoModel,
        "reward": transformers.AutoModelForSequenceClassification,
    }[kind]
    with fetching(full_name(name), f"a {kind} model in a local folder or on the hub"):
        model, info = auto_class.from_pretrained(
            full_name(name),
            dtype=torch_dtype(dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    _check_weights(kind, full_name(name), model, info["missing_keys"])
    if adapter:
        from peft import PeftModel

        with fetching(str(adapter), f"a LoRA adapter of {full_name(name)}"):
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval().to(device())


def _check_weights(kind, name, model, missing_keys):
    # many checkpoints lack a pooler, and hidden states do not depend on one
    missing = sorted(key for key in missing_keys if kind != "base" or "pooler" not in key)
    if missing:
        expected = "a reward model with a trained score head" if kind == "reward" else "all weights"
        raise InputError(
            f"{name}: expected {expected}, found no values for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}, which would be random; "
            "choose another checkpoint"
        )
    if kind == "reward" and model.config.num_labels != 1:
        raise InputError(
            f"{name}: expected a reward model with one score, found {model.config.num_labels} "
            "labels; choose another checkpoint"
        )


def padding_token(tokenizer, name: str) -> int:
    """The id to pad with: the padding token's, else the end token's (padding is masked anyway)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError(
        f"{full_name(name)}: the tokenizer has neither a padding nor an end token; set pad_token"
    )
