"""Prepare the measurements of decode.py: options, engines, thresholds, prompts, controls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ee_llm import distributed
from ee_llm.inference.choices import Attention
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.exits.policy import ExitPolicy, make_exit_policy
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.deferral import Deferral
from ee_llm.inference.strategies import SelfSpeculation, Strategy
from tools.bench.decode_model import (
    Model,
    count_weights,
    excerpts,
    open_model,
    random_model,
    truncate,
)
from tools.bench.decode_peers import Peer
from tools.bench.decode_quality import (
    Control,
    Dense,
    all_controls,
    calibrate,
    depth_of,
    exit_choices,
)
from tools.bench.decode_rows import (
    ASSISTED,
    DEFERRED,
    EXACT,
    FULL,
    PEER,
    PROPAGATE,
    SELF_SPECULATIVE,
    TRUNCATED,
    Sample,
)
from tools.bench.decode_trace import decode

STRATEGIES: dict[str, Strategy] = {
    FULL: "full",
    EXACT: "exact",
    DEFERRED: "exact",
    SELF_SPECULATIVE: "self-speculative",
    PROPAGATE: "propagate",
}
# The minimum number of texts for choosing thresholds and comparing controls.
NUM_TEXTS = 16


@dataclass(frozen=True)
class Options:
    """Compare decoding with early exits with the same engine without exits, and transformers."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Measure fewer batch sizes, tokens and rounds, within a minute on two cores. Explicit options
    take precedence."""
    checkpoint: Path = Path("runs/quickstart")
    """Decode with this model, a run directory or checkpoint with exits, on its validation text."""
    shape: str | None = None
    """Use random weights of this ready-made shape, such as llama-1.3B, instead of a checkpoint.
    This measures the cost of passes, but not how often tokens exit. Requires --thresholds."""
    attention: Attention = "auto"
    """Use this implementation of attention (see ee-llm generate --help-all)."""
    cuda_graphs: bool = False
    """Replay passes of few rows as CUDA graphs."""
    compile: bool = False
    """Compile the layers with torch.compile."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute with this precision on both sides; auto is the engine's default on this device."""
    threads: int | None = None
    """Number of CPU threads; None uses all cores."""
    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    """Batch sizes: the numbers of sequences to decode together."""
    prompt_tokens: int = 32
    """Number of tokens in each prompt."""
    new_tokens: int = 96
    """Number of tokens to decode after each prompt."""
    rounds: int = 7
    """Number of rounds; each measures all sides in turn."""
    thresholds: tuple[float | Literal["off"], ...] = ()
    """Exit if the top token has at least this probability; one value per exit, or one for all.
    Without this option, use the cheapest thresholds at which 95 % of the tokens are the dense
    model's choice."""
    draft_length: int = 4
    """Number of tokens that self-speculative drafts at the first exit before a deep pass."""
    peers: bool = True
    """Also measure transformers."""
    pipeline: bool = True
    """Also measure one sequence over two pipeline stages. Not available on a GPU."""


@dataclass(frozen=True)
class Bench:
    """The engines and peers, which have the same weights, and their prompts and controls.

    `deferrals` has the state of the engine's deferral by side; None or no entry disables deferral.
    """

    options: Options
    model: Model
    dtype: torch.dtype
    engine: Engine
    truncated: Engine
    peers: dict[str, Peer]
    assistant: Peer | None
    policy: ExitPolicy
    prompts: list[tuple[int, ...]]
    dense: Dense
    controls: list[Control]
    deferrals: dict[str, Deferral | None] = field(default_factory=dict)


def prepare(options: Options) -> Bench:
    """Prepare the measurement.

    Raises:
        ValueError: The options are invalid for the model.
    """
    if options.shape is not None and not options.thresholds:
        raise ValueError(f"--shape {options.shape} has random weights and needs --thresholds.")
    model = random_model(options.shape) if options.shape else open_model(options.checkpoint)
    config = model.config
    _check(options, config.model.max_seq_length)
    length = options.prompt_tokens + options.new_tokens
    dtype = distributed.dtype_named(options.dtype)
    most = max(options.batches)
    num_texts = max(most, NUM_TEXTS)
    num_blocks = 1 + 2 * num_texts * -(-length // SchedulerConfig.block_size)
    scheduler_config = SchedulerConfig(max_num_seqs=most, num_blocks=num_blocks)
    device = distributed.device()
    execution = ExecutionConfig(options.attention, options.cuda_graphs, options.compile)
    make = partial(
        Engine, dtype=dtype, scheduler_config=scheduler_config, device=device, execution=execution
    )
    engine = make(config, model.tensors, deferral="auto")
    half = len(model.text) // 2
    text, other = model.text[:half], model.text[half:]  # for prompts, and for choosing thresholds
    dense = Dense(model)
    policy = _policy(options, model, engine, dense, other)
    prompts = excerpts(text, num_texts, options.prompt_tokens)
    texts: dict[str, Sequence[Sequence[int]]] = {
        "the dense model's text": _continued(engine, prompts, options.new_tokens),
        "validation text": excerpts(other, min(num_texts, len(other) // length), length),
    }
    found = all_controls(model, dense.reference, policy, texts, options.prompt_tokens)
    shorter = truncate(model, depth_of(found[0]))
    truncated = make(shorter.config, shorter.tensors)
    peers, assistant = _peers(model, dtype) if options.peers else ({}, None)
    deferrals = {side: deepcopy(engine.deferral) for side in STRATEGIES if side != EXACT}
    return Bench(
        options,
        model,
        dtype,
        engine,
        truncated,
        peers,
        assistant,
        policy,
        prompts,
        dense,
        found,
        deferrals,
    )


def _check(options: Options, max_length: int) -> None:
    for name in ("prompt_tokens", "rounds", "draft_length"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1.")
    if not options.batches or min(options.batches) < 1:
        sizes = " ".join(map(str, options.batches))
        raise ValueError(f"--batches {sizes}: give at least one size, each at least 1.")
    if options.new_tokens < 2:
        raise ValueError(f"--new-tokens {options.new_tokens} is less than 2, so there are no gaps.")
    if options.prompt_tokens + options.new_tokens > max_length:
        raise ValueError(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens}"
            f" together exceed the model's max_seq_length = {max_length}. Use smaller values."
        )


def _policy(
    options: Options, model: Model, engine: Engine, dense: Dense, text: list[int]
) -> ExitPolicy:
    """Return the given policy, or one calibrated on the dense model's text."""
    if options.thresholds:
        given = [None if threshold == "off" else threshold for threshold in options.thresholds]
        policy = make_exit_policy(model.config.exits.boundaries, given)
    else:
        count = min(NUM_TEXTS, len(text) // options.prompt_tokens)
        texts = _continued(engine, excerpts(text, count, options.prompt_tokens), options.new_tokens)
        choices = exit_choices(dense.reference, texts, options.prompt_tokens)
        policy = calibrate(choices, count_weights(model))
    if all(threshold is None for threshold in policy.thresholds):
        raise ValueError(
            "no exit is in use. Train the model for longer, or give --thresholds in (0, 1]."
        )
    return policy


def _continued(engine: Engine, prompts: Sequence[tuple[int, ...]], num_new: int) -> list[list[int]]:
    """Return the prompts, each followed by the dense model's continuation."""
    policy = make_exit_policy(engine.boundaries[:-1], [None])
    made = run(engine, FULL, policy, None, prompts, num_new, "", None)
    return [[*p, *t] for p, t in zip(prompts, made.tokens, strict=True)]


def _peers(model: Model, dtype: torch.dtype) -> tuple[dict[str, Peer], Peer | None]:
    """Return transformers in our dtype and in the other fast dtype, and a peer that drafts."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    name = next(name for name, known in distributed.DTYPES.items() if known == other)
    peers = {PEER: Peer(model, dtype), f"{PEER}, {name}": Peer(model, other)}
    if model.config.exits.head != ("norm",):
        return peers, None
    assistant = Peer(model, dtype)
    assistant.draft_at(model, model.config.exits.boundaries[0])
    return peers, assistant


def run(
    engine: Engine,
    side: str,
    policy: ExitPolicy,
    draft: SelfSpeculation | None,
    prompts: Sequence[tuple[int, ...]],
    num_new: int,
    tenant: str,
    deferral: Deferral | None,
) -> Sample:
    """Decode prompts that arrive at once, as the given side does.

    Args:
        engine: The engine.
        side: The name of the side, which selects the strategy.
        policy: The exit policy.
        draft: The settings of the self-speculative strategy.
        prompts: The token ids of each prompt.
        num_new: The number of new tokens per prompt.
        tenant: A name that no earlier call used, so that no prefix is in the cache.
        deferral: The state of deferral, which is updated, or None to disable deferral.
    """
    strategy = STRATEGIES.get(side, "full")
    draft = draft if strategy == "self-speculative" else None
    params = SamplingParams(max_tokens=num_new)
    requests = [
        Request(str(n), prompt, policy, params, strategy, draft, tenant=tenant)
        for n, prompt in enumerate(prompts)
    ]
    with using_deferral(engine, deferral):
        trace = decode(engine, requests)
    tokens = [generation.token_ids for generation in trace.generations]
    return Sample(trace.seconds, list(prompts), tokens, trace)


@contextmanager
def using_deferral(engine: Engine, deferral: Deferral | None) -> Iterator[None]:
    """Use `deferral` in the engine inside the `with` block; None disables deferral."""
    before, engine.deferral = engine.deferral, deferral
    engine.scheduler.deferral_targets = [1] * engine.scheduler.num_segments
    try:
        yield
    finally:
        engine.deferral = before


def sides(bench: Bench, batch: int) -> dict[str, Callable[[int], Sample]]:
    """Return a function per side, by name, that decodes the prompts of a round."""
    options, model = bench.options, bench.model
    draft_exit = model.config.exits.boundaries[0]
    draft = SelfSpeculation(draft_exit, options.draft_length)

    def prompts(number: int) -> list[tuple[int, ...]]:
        # Small batches use different prompts in each round.
        count = len(bench.prompts)
        return [bench.prompts[(number * batch + index) % count] for index in range(batch)]

    def ours(side: str, number: int) -> Sample:
        engine, policy = bench.engine, bench.policy
        if side == TRUNCATED:
            engine, policy = bench.truncated, make_exit_policy((), (None,))
        tenant, deferral = f"{side} {batch} {number}", bench.deferrals.get(side)
        num_new = options.new_tokens
        return run(engine, side, policy, draft, prompts(number), num_new, tenant, deferral)

    def theirs(peer: Peer, number: int) -> Sample:
        made = peer.decode(prompts(number), options.new_tokens)
        return Sample(made.seconds, prompts(number), made.tokens)

    def drafting(peer: Peer, length: int | None, number: int) -> Sample:
        made = peer.decode_assisted(prompts(number)[0], options.new_tokens, draft_exit, length)
        return Sample(made.seconds, prompts(number), made.tokens)

    found: dict[str, Callable[[int], Sample]] = {
        side: partial(ours, side) for side in (*STRATEGIES, TRUNCATED)
    }
    found |= {name: partial(theirs, peer) for name, peer in bench.peers.items()}
    if bench.assistant and batch == 1:
        found[ASSISTED] = partial(drafting, bench.assistant, None)
        length = options.draft_length
        found[f"{ASSISTED} {length}"] = partial(drafting, bench.assistant, length)
    return found
