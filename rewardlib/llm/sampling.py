"""Sampled responses, with transformers or vLLM."""

from pathlib import Path

from rewardlib import artifacts
from rewardlib.llm import encoding, loading


def encode(tokenizer, text):
    """Token ids of a text that goes on: with the tokenizer's start token, without an end token."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def decode(tokenizer, prompt, new):
    """Text of the `new` ids after the `prompt` ids, up to the end token.

    They are decoded behind the prompt's last ids, as some tokenizers drop the space at the start of
    a text.
    """
    if tokenizer.eos_token_id in new:
        new = new[: list(new).index(tokenizer.eos_token_id)]
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt[-4:], **settings)
    return tokenizer.decode([*prompt[-4:], *new], **settings)[len(before) :]


def sample(model, tokenizer, prompt, seed, n, max_len, temperature, top_p):
    """n lists of new token ids after the ids `prompt`. They depend on the prompt, the seed and n alone."""
    import torch
    from transformers import GenerationConfig

    # the checkpoint's own generation settings (top_k, penalties) must not mix with those asked for
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    settings = {"max_new_tokens": max_len, "eos_token_id": end, "pad_token_id": pad}
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    model.generation_config = GenerationConfig(**settings)
    ids = torch.tensor([prompt], device=model.device)
    made = []
    for start in range(0, n, encoding.CHUNK):
        torch.manual_seed(seed + start)
        rows = min(encoding.CHUNK, n - start)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), num_return_sequences=rows
            )
        made += out[:, len(prompt) :].tolist()
    return made


def vllm_engine(
    name,
    dtype,
    adapter,
    max_model_len,
    tensor_parallel,
    gpu_memory_utilization,
    seed,
    trust_remote_code,
):
    """sample_all(prompts, seeds, n, max_len, temperature, top_p): n lists of new ids for each of the lists of ids."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {}
    if adapter:
        rank = artifacts.read_json(Path(adapter) / "adapter_config.json", "step 1")["r"]
        lora = {"enable_lora": True, "max_lora_rank": max(8, rank), "max_loras": 1}
    with loading.fetching(
        loading.full_name(name), "a model that vLLM can serve (see also --gpu_memory_utilization)"
    ):
        engine = LLM(
            model=loading.full_name(name),
            dtype=str(loading.torch_dtype(dtype)).removeprefix("torch."),
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=gpu_memory_utilization,
            seed=seed,
            generation_config="vllm",
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
        outs = engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, lora_request=request
        )
        return [[list(one.token_ids) for one in out.outputs] for out in outs]

    return sample_all
