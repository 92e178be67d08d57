"""Responses sampled from a causal language model, with transformers or with vLLM."""

from collections.abc import Callable
from pathlib import Path

import torch

from rewardlib import artifacts
from rewardlib.llm import loading

# Responses per call of generate. The seed of a call depends on it: another size, other responses.
CHUNK = 32


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text that will be continued: start token kept, end token removed."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def decode(tokenizer, prompt: list[int], new: list[int]) -> str:
    """Text of the `new` ids that follow the `prompt` ids, up to the end token.

    The new ids are decoded together with the prompt's last ids, because some tokenizers drop the
    space at the start of a text.
    """
    if tokenizer.eos_token_id in new:
        new = new[: list(new).index(tokenizer.eos_token_id)]
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    context = tokenizer.decode(prompt[-4:], **settings)
    return tokenizer.decode([*prompt[-4:], *new], **settings)[len(context) :]


def sample(
    model,
    tokenizer,
    prompt: list[int],
    seed: int,
    n: int,
    max_len: int,
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    """Sample n continuations of the ids `prompt`, as n lists of new token ids.

    For given settings the continuations depend on the prompt, the seed and n alone, not on other
    prompts. A temperature of 0 decodes greedily. `max_len` counts new tokens.
    """
    from transformers import GenerationConfig

    # the checkpoint's own generation settings (top_k, penalties) must not mix with those asked for
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    settings = {"max_new_tokens": max_len, "eos_token_id": end, "pad_token_id": pad}
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    model.generation_config = GenerationConfig(**settings)
    ids = torch.tensor([prompt], device=model.device)
    continuations = []
    for start in range(0, n, CHUNK):
        torch.manual_seed(seed + start)
        n_sequences = min(CHUNK, n - start)
        with torch.inference_mode():
            sequences = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), num_return_sequences=n_sequences
            )
        continuations += sequences[:, len(prompt) :].tolist()
    return continuations


def vllm_engine(
    name: str,
    dtype: str,
    adapter: Path | None,
    max_model_len: int,
    tensor_parallel: int,
    gpu_memory_utilization: float,
    seed: int,
    trust_remote_code: bool,
) -> Callable[..., list[list[list[int]]]]:
    """Load a model into vLLM and return sample_all, which samples for many prompts at once.

    sample_all(prompts, seeds, n, max_len, temperature, top_p) takes one list of token ids and one
    seed per prompt, and returns n lists of new token ids per prompt.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {}
    if adapter:
        rank = artifacts.read_json(Path(adapter) / "adapter_config.json", "step 1")["r"]
        lora = {"enable_lora": True, "max_lora_rank": max(8, rank), "max_loras": 1}
    with loading.fetching(
        loading.full_name(name), "a model that vLLM can serve (see also gpu_memory_utilization)"
    ):
        engine = LLM(
            model=loading.full_name(name),
            dtype=str(loading.torch_dtype(dtype)).removeprefix("torch."),
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=gpu_memory_utilization,
            seed=seed,
            generation_config="vllm",  # not the checkpoint's own settings, as in `sample`
            trust_remote_code=trust_remote_code,
            **lora,
        )
    request = LoRARequest("sft", 1, str(adapter)) if adapter else None

    def sample_all(prompts, seeds, n, max_len, temperature, top_p):
        settings = {
            "n": n,
            "max_tokens": max_len,
            "temperature": temperature,
            "top_p": top_p,
            "detokenize": False,
        }
        params = [SamplingParams(seed=seed, **settings) for seed in seeds]
        token_prompts = [{"prompt_token_ids": ids} for ids in prompts]
        results = engine.generate(token_prompts, params, lora_request=request)
        return [[list(output.token_ids) for output in result.outputs] for result in results]

    return sample_all
