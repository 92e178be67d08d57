"""Speed of step 4: tokens per second of a model, and its share of the measured matrix rate.

The model has random weights, so nothing is downloaded. On a GPU it has the shape of Gemma 2B and
computes in bfloat16; on a CPU it is tiny. The matrix rate is that of the fastest of several large
square products in the same data type. Operations per token: 2 per weight of the linear layers, and
2 x length x width per layer for causal attention. The reference is batch size 1.

Reads   nothing
Writes  --output, where it is given: the numbers as JSON
Example python -m benchmarks.embedding_speed --length 512 --output embedding_speed.json
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from rewardlib import artifacts
from rewardlib.cli import console, kinds
from rewardlib.llm import encoding, loading

SHAPES = {
    "gemma2b": {
        "vocab_size": 256000,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
}


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "--shape",
        choices=sorted(SHAPES),
        help="architecture of the model; None: gemma2b on a GPU, tiny on a CPU",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="data type of the model; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--length", type=kinds.count, default=512, help="number of tokens of a text"
    )
    parser.add_argument(
        "--texts", type=kinds.count, help="number of texts; None: 2048 on a GPU, 64 on a CPU"
    )
    parser.add_argument(
        "--batch_tokens",
        type=kinds.count,
        default=16384,
        help="maximum number of tokens per batch, as in step 4",
    )
    parser.add_argument(
        "--repeats",
        type=kinds.count,
        default=3,
        help="number of runs, of which the median is reported",
    )
    parser.add_argument(
        "--seed", type=kinds.seed, default=0, help="random seed of the weights and texts"
    )
    parser.add_argument("--output", help="JSON file for the results; None: print them only")
    return parser.parse_args(argv)


def make_model(shape: str, dtype: torch.dtype, seed: int):
    """A Gemma-like base model with random weights, in evaluation mode on the device."""
    from transformers import AutoModel, GemmaConfig

    torch.manual_seed(seed)
    config = GemmaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with torch.device(loading.device()):
        model = AutoModel.from_config(config, dtype=dtype)
    return model.eval()


def seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Wall seconds of each of `repeats` calls, after a first call that warms up."""
    durations = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a call returns before the GPU has finished
        durations.append(time.perf_counter() - start)
    return durations[1:]


def matrix_rate(dtype: torch.dtype, repeats: int) -> float:
    """Floating-point operations per second of the fastest large matrix product."""
    rates = []
    for size in (4096, 8192, 16384) if torch.cuda.is_available() else (1024, 2048):
        a, b = (torch.randn(size, size, device=loading.device(), dtype=dtype) for _ in range(2))
        rates.append(2 * size**3 / min(seconds(lambda a=a, b=b: a @ b, repeats * 5)))
    return max(rates)


def work_per_token(model, length: int) -> int:
    """Floating-point operations of one token's forward pass in a text of `length` tokens."""
    config = model.config
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    # a token attends to length / 2 others on average, in two products of 2 operations per element
    attention = 2 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * linear + attention


def measure(args) -> dict:
    """Rates of texts of equal length, of mixed lengths and one at a time; shares and memory."""
    on_gpu = torch.cuda.is_available()
    shape = args.shape or ("gemma2b" if on_gpu else "tiny")
    n = args.texts or (2048 if on_gpu else 64)
    dtype = loading.torch_dtype(args.dtype)
    model = make_model(shape, dtype, args.seed)
    rng = np.random.default_rng(args.seed)
    rows = rng.integers(10, SHAPES[shape]["vocab_size"], (n, args.length)).tolist()
    mixed = [row[: rng.integers(args.length // 8 + 1, args.length + 1)] for row in rows]

    def tokens_per_second(texts, batch_tokens, repeats):
        durations = seconds(lambda: encoding.embed(model, texts, 0, batch_tokens), repeats)
        return sum(map(len, texts)) / np.median(durations)

    with loading.memory_of(f"--batch_tokens (now {args.batch_tokens})"):
        full = tokens_per_second(rows, args.batch_tokens, args.repeats)
        mixed_rate = tokens_per_second(mixed, args.batch_tokens, args.repeats)
    peak = matrix_rate(dtype, args.repeats)
    single = mixed[: max(8, n // 16)]
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "shape": shape,
        "dtype": str(dtype),
        "length": args.length,
        "batch_tokens": args.batch_tokens,
        "tokens_per_second": full,
        "tokens_per_second_mixed_lengths": mixed_rate,
        "tokens_per_second_batch_1": tokens_per_second(single, 1, 1),
        "matrix_rate_teraflops": peak / 1e12,
        "share_of_matrix_rate": full * work_per_token(model, args.length) / peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def main(argv=None):
    args = parse_args(argv)
    results = measure(args)
    for name, value in results.items():
        print(f"{name:34s} {value:.4g}" if isinstance(value, float) else f"{name:34s} {value}")
    if args.output:
        artifacts.write_json(args.output, results)


if __name__ == "__main__":
    console.run(main, "embedding_speed")
