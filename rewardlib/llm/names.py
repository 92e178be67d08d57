"""Names of language models: their Hugging Face ids, and short forms for file names.

They stand apart from loading.py because rewardlib.api uses them, and does without torch.
"""

import hashlib
import re
from pathlib import Path

NAMES = {
    "gemma2b": "google/gemma-2b",
    "gemma7b": "google/gemma-7b",
    "llama38b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "rmmistral7b": "weqweasdas/RM-Mistral-7B",
    "rayharmless": "Ray2333/gpt2-large-harmless-reward_model",
}


def full_name(name: str) -> str:
    """Hugging Face id of a short name in NAMES; any other name is returned as given."""
    return NAMES.get(name, name)


def label(name: str) -> str:
    """Short form of a model, data set or path for file names.

    A path gets a digest of its full path, since folders of the same name may hold different models.
    """
    if name in NAMES:
        return {"llama3-8b": "llama38b"}.get(name, name)
    path = Path(name)
    is_data_file = path.suffix in (".jsonl", ".csv")
    plain = re.sub(r"[^\w.+-]+", "-", path.stem if is_data_file else path.name)
    if path.exists() or is_data_file:
        return f"{plain}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}"
    return re.sub(r"[^\w.+-]+", "-", name)
