"""What decode.py measures, made ready: options, engines, peers, thresholds, prompts, controls."""

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
    cut,
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
    choices,
    depth_of,
)
from tools.bench.decode_rows import (
    ASSISTED,
    EXACT,
    FULL,
    HELD,
    PEER,
    PROPAGATE,
    TRUNCATED,
    VERIFY,
    Sample,
)
from tools.bench.decode_trace import decode

STRATEGIES: dict[str, Strategy] = {
    FULL: "full",
    EXACT: "exact",
    HELD: "exact",
    VERIFY: "self-speculative",
    PROPAGATE: "propagate",
}
# Texts, at least, that thresholds are found on, and controls are compared on.
NUM_TEXTS = 16


@dataclass(frozen=True)
class Options:
    """Decoding with early exits, over the same engine without them and over transformers."""

    json: Path | None = None
    """Where to write machine, rows and figures."""
    quick: bool = False
    """Fewer batch sizes, tokens and rounds: ends within a minute on two cores. What is given
    beside it wins."""
    checkpoint: Path = Path("runs/quickstart")
    """Run directory or checkpoint of a model with exits; its run's validation text is continued."""
    shape: str | None = None
    """Ready-made shape to take with random weights in place of a checkpoint, as llama-1.3B: for
    what passes cost; it says nothing of how often tokens leave. Needs --thresholds."""
    attention: Attention = "auto"
    """How our engine attends, see ee-llm generate --help."""
    cuda_graphs: bool = False
    """Whether our engine replays passes of few rows as CUDA graphs."""
    compile: bool = False
    """Whether our engine's layers go through torch.compile."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision of both sides; auto is the engine's own choice for this device."""
    threads: int | None = None
    """Threads of this process on a CPU; torch's choice, all cores, unless given."""
    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    """Sequences that are decoded together."""
    prompt_tokens: int = 32
    """Tokens of each prompt."""
    new_tokens: int = 96
    """Tokens that are decoded after each prompt."""
    rounds: int = 7
    """Times that every side is measured, all of them in turn."""
    thresholds: tuple[float | Literal["off"], ...] = ()
    """Probability of the top token at which a token leaves: one for each exit, or one for all.
    Unless given, what costs least while 95 % of the tokens are the dense model's choice."""
    draft_length: int = 4
    """Tokens that verify drafts at the first exit before a deep pass."""
    peers: bool = True
    """Whether to measure transformers."""
    pipeline: bool = True
    """Whether to measure one sequence over two pipeline stages, on a CPU."""


@dataclass(frozen=True)
class Bench:
    """All that is measured: engines and peers with the same weights, prompts, controls.

    holdings: what the engine has learned about holding, by side.
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
    holdings: dict[str, Deferral | None] = field(default_factory=dict)


def prepare(options: Options) -> Bench:
    """Return what is to be measured; raises ValueError for options that do not fit the model."""
    if options.shape is not None and not options.thresholds:
        raise ValueError(f"--shape {options.shape} has random weights: give it --thresholds")
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
    text, other = model.text[:half], model.text[half:]  # prompts, and what is seen before them
    dense = Dense(model)
    policy = _policy(options, model, engine, dense, other)
    prompts = cut(text, num_texts, options.prompt_tokens)
    texts: dict[str, Sequence[Sequence[int]]] = {
        "the dense model's text": _continued(engine, prompts, options.new_tokens),
        "validation text": cut(other, min(num_texts, len(other) // length), length),
    }
    found = all_controls(model, dense.reference, policy, texts, options.prompt_tokens)
    shorter = truncate(model, depth_of(found[0]))
    truncated = make(shorter.config, shorter.tensors)
    peers, assistant = _peers(model, dtype) if options.peers else ({}, None)
    holdings = {side: deepcopy(engine.deferral) for side in STRATEGIES if side != EXACT}
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
        holdings,
    )


def _check(options: Options, max_length: int) -> None:
    for name in ("prompt_tokens", "rounds", "draft_length"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if not options.batches or min(options.batches) < 1:
        raise ValueError(f"--batches {options.batches}: at least one, of 1 sequence or more")
    if options.new_tokens < 2:
        raise ValueError(f"--new-tokens {options.new_tokens}: at least 2, to see what lies between")
    if options.prompt_tokens + options.new_tokens > max_length:
        raise ValueError(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens} are"
            f" more than the model's max_seq_length = {max_length}"
        )


def _policy(
    options: Options, model: Model, engine: Engine, dense: Dense, text: list[int]
) -> ExitPolicy:
    """Return the policy that is given, or the one found on what the dense model writes."""
    if options.thresholds:
        given = [None if threshold == "off" else threshold for threshold in options.thresholds]
        policy = make_exit_policy(model.config.exits.boundaries, given)
    else:
        count = min(NUM_TEXTS, len(text) // options.prompt_tokens)
        texts = _continued(engine, cut(text, count, options.prompt_tokens), options.new_tokens)
        said = choices(dense.reference, texts, options.prompt_tokens)
        policy = calibrate(said, count_weights(model))
    if all(threshold is None for threshold in policy.thresholds):
        raise ValueError(
            "no exit is in use: train the model for longer, or give --thresholds in (0, 1]"
        )
    return policy


def _continued(engine: Engine, prompts: Sequence[tuple[int, ...]], num_new: int) -> list[list[int]]:
    """Return the prompts with what the dense model makes of them."""
    policy = make_exit_policy(engine.boundaries[:-1], [None])
    made = run(engine, FULL, policy, None, prompts, num_new, "", None)
    return [[*p, *t] for p, t in zip(prompts, made.tokens, strict=True)]


def _peers(model: Model, dtype: torch.dtype) -> tuple[dict[str, Peer], Peer | None]:
    """Return transformers in our dtype and in the other fast one, and with drafts at an exit."""
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
    learned: Deferral | None,
) -> Sample:
    """Return what a side makes of prompts that come at once.

    tenant: of its own, so that no prefix is found in the cache. learned: None is no holding.
    """
    strategy = STRATEGIES.get(side, "full")
    draft = draft if strategy == "self-speculative" else None
    params = SamplingParams(max_tokens=num_new)
    requests = [
        Request(str(n), prompt, policy, params, strategy, draft, tenant=tenant)
        for n, prompt in enumerate(prompts)
    ]
    with deferral(engine, learned):
        trace = decode(engine, requests)
    tokens = [generation.token_ids for generation in trace.generations]
    return Sample(trace.seconds, list(prompts), tokens, trace)


@contextmanager
def deferral(engine: Engine, learned: Deferral | None) -> Iterator[None]:
    """Let the engine hold rows by what it has learned, and learn on, or not hold any."""
    before, engine.deferral = engine.deferral, learned
    engine.scheduler.deferral_targets = [1] * engine.scheduler.num_segments
    try:
        yield
    finally:
        engine.deferral = before


def sides(bench: Bench, batch: int) -> dict[str, Callable[[int], Sample]]:
    """Return what each side does in a round, by name."""
    options, model = bench.options, bench.model
    draft_exit = model.config.exits.boundaries[0]
    draft = SelfSpeculation(draft_exit, options.draft_length)

    def prompts(number: int) -> list[tuple[int, ...]]:
        # Small batches take other prompts in every round.
        count = len(bench.prompts)
        return [bench.prompts[(number * batch + index) % count] for index in range(batch)]

    def ours(side: str, number: int) -> Sample:
        engine, policy = bench.engine, bench.policy
        if side == TRUNCATED:
            engine, policy = bench.truncated, make_exit_policy((), (None,))
        tenant, learned = f"{side} {batch} {number}", bench.holdings.get(side)
        num_new = options.new_tokens
        return run(engine, side, policy, draft, prompts(number), num_new, tenant, learned)

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
