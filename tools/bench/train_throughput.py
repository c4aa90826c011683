"""Compare the training speed without exits with a plain PyTorch loop on transformers' Llama.

    python tools/bench/train_throughput.py --json throughput.json [--quick]
    python tools/bench/train_throughput.py --shape llama-1.3B --dtype bfloat16    (on a GPU)

Both train in one process and alternate step by step. See docs/reference/benchmarks.md for the
method and results.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.data import Microbatch
from ee_llm.training.optimizer import build_optimizer, take_step
from ee_llm.training.parallel import ParallelModel
from tools.bench import report
from tools.bench.llama import llama_config

QUICK = {"seq_length": 128, "num_microbatches": 1, "rounds": 8}


@dataclass(frozen=True)
class Options:
    """Compare the training speed of one process with a plain loop on transformers' Llama."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Run fewer rounds on smaller batches, within a minute on two cores. Explicit options take
    precedence."""
    shape: str = "llama-tiny"
    """Train this ready-made llama shape (see docs/reference/configuration.md)."""
    num_layers: int | None = None
    """Number of layers; None uses that of the shape."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of both sides. In bfloat16, only ee_llm keeps float32 master weights and gradients,
    which gives the plain loop an advantage."""
    seq_length: int | None = None
    """Number of tokens per sequence; None uses the maximum of the shape."""
    micro_batch_size: int = 4
    """Number of sequences per forward pass."""
    num_microbatches: int = 2
    """Number of forward and backward passes per optimizer step."""
    rounds: int = 20
    """Number of steps to time on each side."""
    threads: int | None = None
    """Number of CPU threads; None uses all cores."""


def make_config(options: Options) -> Config:
    """Return ee_llm's configuration of the model without exits."""
    overrides: dict[str, object] = {
        "model.shape": options.shape,
        "training.dtype": options.dtype,
        "training.micro_batch_size": options.micro_batch_size,
        "training.global_batch_size": options.micro_batch_size * options.num_microbatches,
    }
    if options.num_layers is not None:
        overrides["model.num_layers"] = options.num_layers
    if options.seq_length is not None:
        overrides["data.seq_length"] = options.seq_length
    return load_config(None, overrides)


def our_step(config: Config, tokens: list[torch.Tensor]) -> Callable[[], Any]:
    """Return a function that takes one training step as `ee-llm train` does."""
    dtype = distributed.DTYPES[config.training.dtype]
    grid = distributed.initialize(seed=config.training.seed)
    model = ParallelModel(config, grid, dtype)
    optimizer = build_optimizer(model.chunks, config.optimizer, data_size=1, dtype=dtype)
    length = config.data.seq_length
    positions = torch.arange(length, device=distributed.device())
    batches = [
        Microbatch(
            tokens=batch[:, :-1],
            labels=batch[:, 1:],
            loss_mask=torch.ones(len(batch), length, device=distributed.device()),
            positions=positions.expand(len(batch), length),
        )
        for batch in tokens
    ]

    def step() -> None:
        model.forward_backward(batches, 0)
        take_step(optimizer, clip_grad=config.optimizer.clip_grad)

    return step


def plain_step(config: Config, tokens: list[torch.Tensor]) -> Callable[[], Any]:
    """Return a function that takes one step of a plain training loop with transformers."""
    from transformers import LlamaForCausalLM

    options = config.optimizer
    llama = llama_config(config, use_cache=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(llama)
    model = model.to(distributed.device(), distributed.DTYPES[config.training.dtype]).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )

    def step() -> None:
        optimizer.zero_grad()
        for batch in tokens:
            # transformers shifts the labels itself. Both sides compute as many positions.
            inputs = batch[:, :-1]
            (model(input_ids=inputs, labels=inputs).loss / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()

    return step


def flops_per_token(config: Config) -> float:
    """Return the floating-point operations of forward and backward passes for one token.

    There are 6 operations for each weight of a matrix product (the embedding is not one), and 6 s
    for each layer and unit of the heads' total width, because causal attention reads half of the s
    positions on average.
    """
    shape = config.model
    queries, groups = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = shape.hidden_size * (2 * queries + 2 * groups)
    mlp = 3 * shape.hidden_size * shape.ffn_hidden_size
    weights = shape.num_layers * (attention + mlp) + shape.hidden_size * shape.vocab_size
    return 6 * weights + 6 * shape.num_layers * queries * config.data.seq_length


def measure(options: Options, config: Config) -> dict[str, list[float]]:
    """Return the seconds of each side's steps by round."""
    generator = torch.Generator().manual_seed(1)
    shape = (options.micro_batch_size, config.data.seq_length + 1)
    tokens = [
        torch.randint(config.model.vocab_size, shape, generator=generator).to(distributed.device())
        for _ in range(options.num_microbatches)
    ]
    sides = {"ee_llm": our_step(config, tokens), "transformers": plain_step(config, tokens)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-2, options.rounds):
        for name in sorted(sides, reverse=index % 2 == 1):
            distributed.synchronize()
            start = time.perf_counter()
            sides[name]()
            distributed.synchronize()
            if index >= 0:  # the first rounds allocate and choose kernels
                seconds[name].append(time.perf_counter() - start)
    distributed.shutdown()
    return seconds


def main(options: Options) -> None:
    """Measure, print the table and write the figures."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = make_config(options)
    seconds = measure(options, config)
    tokens = options.micro_batch_size * options.num_microbatches * config.data.seq_length
    peak = distributed.peak_flops(distributed.DTYPES[config.training.dtype])
    rows: list[dict[str, Any]] = []
    for name, samples in seconds.items():
        speed = tokens / statistics.median(samples)
        low, high = (tokens / x for x in reversed(report.quartiles(samples)))
        flops = speed * flops_per_token(config)
        rows.append(
            {
                "side": name,
                "tokens_per_s": speed,
                "tokens_per_s_low": low,
                "tokens_per_s_high": high,
                "flops": flops,
                "mfu": None if peak is None else flops / peak,
            }
        )
    ratio = report.ratio_of_medians(seconds["transformers"], seconds["ee_llm"])
    title = (
        f"training, {options.shape}, {config.model.num_layers} layers, {options.dtype}, "
        f"{options.num_microbatches} x {options.micro_batch_size} x {config.data.seq_length} tokens"
    )
    if not distributed.has_cuda():
        title += f", {torch.get_num_threads()} threads"
    report.print_table(title, [_cells(row) for row in rows])
    print(f"ee_llm over transformers: {ratio}")
    figures = {
        "tokens_per_s_ratio": ratio.value,
        "tokens_per_s_ratio_low": ratio.low,
        "tokens_per_s_ratio_high": ratio.high,
    }
    if peak is not None:
        figures["mfu"] = rows[0]["mfu"]
    report.write_json(options.json, rows, figures)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    low, high = row["tokens_per_s_low"], row["tokens_per_s_high"]
    return {
        "": row["side"],
        "tokens/s [quartiles]": f"{row['tokens_per_s']:,.0f} [{low:,.0f} .. {high:,.0f}]",
        "GFLOP/s": f"{row['flops'] / 1e9:,.0f}",
        "MFU": "unknown peak" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %",
    }


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except ValueError as error:
        sys.exit(f"train_throughput: {error}")
