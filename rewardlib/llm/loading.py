"""Language models by name or folder: fingerprints, tokenizers and models, loaded with checks.

transformers and torch are imported where they are used: the steps on arrays do without
transformers.
"""

import contextlib
import hashlib
import sys
from pathlib import Path

from rewardlib import artifacts
from rewardlib.errors import InputError

NAMES = {
    "gemma2b": "google/gemma-2b",
    "gemma7b": "google/gemma-7b",
    "llama38b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "rmmistral7b": "weqweasdas/RM-Mistral-7B",
    "rayharmless": "Ray2333/gpt2-large-harmless-reward_model",
}
REWARD_MODELS = {"helpful": "rmmistral7b", "harmless": "rayharmless"}
SAMPLE_BYTES = 1 << 20


@contextlib.contextmanager
def fetching(name, expected):
    """Turn whatever goes wrong while `name` is read or downloaded into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise InputError(
            f"{name}: expected {expected}, found: {reason}; check the name, the access and the network "
            "(finished files of a download are kept: the same command goes on)"
        ) from error


@contextlib.contextmanager
def memory_of(flags):
    """CUDA out of memory becomes a line that names the `flags` to lower."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise InputError(
            f"CUDA out of memory; lower {flags}, and run the same command again"
        ) from error


def _is_out_of_memory(error):
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return (
        "cuda out of memory" in text
        or "free memory on device" in text
        or "memory for the cache blocks" in text
    )


def full_name(name):
    return NAMES.get(name, name)


def fingerprint(name):
    """What tells one version of a model from another: digests of a folder's files, or the revision on the hub."""
    folder = Path(full_name(name))
    if not folder.is_dir():
        from transformers.utils import cached_file

        with fetching(full_name(name), "a local folder or a model on the hub"):
            return {
                "hub": full_name(name),
                "revision": Path(cached_file(full_name(name), "config.json")).parent.name,
            }
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != artifacts.MANIFEST
    ]
    return {path.name: _digest_ends(path) for path in files}


def _digest_ends(path):
    """Digest of the size, the first and the last MB: weights of many GB are told apart without reading them."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(f"{size} ".encode() + file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_dtype(name):
    """The torch dtype called `name`; auto is bfloat16 on a GPU and float32 elsewhere."""
    import torch

    return getattr(
        torch, ("bfloat16" if device() == "cuda" else "float32") if name == "auto" else name
    )


def quiet():
    """Progress bars of transformers on a terminal only; its report of the weights is replaced by our own check."""
    import logging

    from transformers.utils import logging as bars

    if not sys.stderr.isatty():
        bars.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_report)


def _is_no_report(record):
    return "LOAD REPORT" not in record.getMessage()


def load_tokenizer(name, trust_remote_code=False):
    from transformers import AutoTokenizer

    with fetching(full_name(name), "the tokenizer of a local folder or of a model on the hub"):
        return AutoTokenizer.from_pretrained(full_name(name), trust_remote_code=trust_remote_code)


def load_model(kind, name, dtype="auto", trust_remote_code=False, adapter=None):
    """A model in evaluation mode on the device. kind: "causal", "base" (hidden states) or "reward" (one score).

    Weights that the checkpoint lacks would be random: they are refused.
    """
    import transformers

    quiet()
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "base": transformers.AutoModel,
        "reward": transformers.AutoModelForSequenceClassification,
    }[kind]
    with fetching(full_name(name), f"a {kind} model in a local folder or on the hub"):
        model, info = auto.from_pretrained(
            full_name(name),
            dtype=torch_dtype(dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(key for key in info["missing_keys"] if kind != "base" or "pooler" not in key)
    if missing:
        why = "a reward model with a trained score head" if kind == "reward" else "all weights"
        raise InputError(
            f"{full_name(name)}: expected {why}, found none for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}; they would be random: give another checkpoint"
        )
    if kind == "reward" and model.config.num_labels != 1:
        raise InputError(
            f"{full_name(name)}: expected a reward model with one score, found {model.config.num_labels} labels"
        )
    if adapter:
        from peft import PeftModel

        with fetching(str(adapter), f"a LoRA adapter of {full_name(name)}"):
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval().to(device())


def padding_token(tokenizer, name):
    """The id to pad with: the tokenizer's own, else its end token (masked either way)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError(
        f"{full_name(name)}: expected a tokenizer with a pad or an end token, found none; set pad_token"
    )
