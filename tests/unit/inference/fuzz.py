"""Create random traffic for the engine, and a scheduler that makes any valid choice."""

import random
from dataclasses import dataclass, replace

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.inference.decoding.settings import SLED, Contrast, DoLa, resolve_contrast
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.exits.policy import ExitPolicy, make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.output import TokenRange
from ee_llm.inference.scheduling.scheduler import Scheduler
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation
from ee_llm.inference.verification.reference_decoding import generate_reference
from tests.unit.inference.models import VOCABULARY, random_gates, random_tensors

RANGES = {"agreement": (0.01, 0.5), "saturation": (0.8, 0.99)}
"""Thresholds that many rows of a random model reach; for other measures, 0.05 to 0.9."""


class RandomScheduler(Scheduler):
    """Run random rows of those that may run, in any segment, and preempt random sequences."""

    random: random.Random

    def _pick(self) -> int:
        if self.running and self.random.random() < 0.03:
            self.preempt(self.random.choice(self.running))
            self._admit()
        return self.random.choice([s for s in range(self.num_segments) if self._runnable(s)])

    def _runnable(self, segment: int) -> list[TokenRange]:
        """Return the longest range of each sequence that may run through `segment`."""
        ranges = []
        for sequence in self.running:
            start = sequence.watermarks[segment]
            if segment == 0:
                free = self.config.max_pending - sequence.num_pending
                stop = min(len(sequence.tokens), start + free)
            else:
                stop = sequence.watermarks[segment - 1]
            if stop > start:
                ranges.append(TokenRange(sequence.slot, start, stop))
        return ranges

    def _ranges(self, segment, carried=()):
        stops = {token_range.slot: token_range.stop for token_range in carried}
        ranges = []
        for sequence in self.running:
            if sequence.slot in stops:
                start = sequence.watermarks[segment]
                ranges.append(TokenRange(sequence.slot, start, stops[sequence.slot]))
        for token_range in self._runnable(segment):
            if token_range.slot not in stops and (self.random.random() < 0.7 or not ranges):
                stop = self.random.randint(token_range.start + 1, token_range.stop)
                ranges.append(TokenRange(token_range.slot, token_range.start, stop))
        self.random.shuffle(ranges)
        return ranges


@dataclass(frozen=True)
class Traffic:
    """Requests, the step at which each arrives, and the step at which some are aborted."""

    requests: list[Request]
    arrivals: list[int]
    aborts: dict[int, list[str]]


def random_policy(rng: random.Random, config: Config) -> ExitPolicy:
    """Return a policy of any measure; its thresholds are in the range of the measure's values."""
    exits = config.exits.boundaries
    thresholds = [rng.choice([None, rng.uniform(0.05, 0.9)]) for _ in exits]
    measure = rng.choice(["max_probability", "entropy", "margin"])
    more = random.Random(f"{thresholds}")
    if more.random() < 0.5:
        measure = more.choice(["agreement", "shortlist", "saturation", "gate"])
        lowest, highest = RANGES.get(measure, (0.05, 0.9))
        thresholds = [one and more.uniform(lowest, highest) for one in thresholds]
    return make_exit_policy(exits, thresholds, measure)


def random_contrast(rng: random.Random, strategy: str, config: Config) -> Contrast | None:
    """Return settings of `sled` or `dola`; None for other strategies."""
    if strategy not in ("sled", "dola"):
        return None
    exits, num_layers = config.exits.boundaries, config.model.num_layers
    head = rng.choice([None, "final", "raw", "exits"])
    candidates = exits if head == "exits" else range(num_layers)
    layers = rng.choice([None, tuple(rng.sample(candidates, rng.randint(1, len(candidates))))])
    if strategy == "dola":
        found: Contrast = DoLa(layers=layers, head=head, alpha=rng.choice([0.1, 0.02, 1.0]))
    else:
        found = SLED(
            rate=rng.uniform(0.5, 10.0),
            scale=rng.choice([1, 5, 20, VOCABULARY]),
            tau=rng.choice([1.0, 0.7]),
            layers=layers,
            head=head,
            variant=rng.choice(["paper", "released"]),
        )
    return resolve_contrast(found, config)


def random_request(
    rng: random.Random, id: str, config: Config, policies: list[ExitPolicy]
) -> Request:
    """Return a request with one of the policies; requests of one policy share cached blocks."""
    exits = config.exits.boundaries
    strategy = rng.choice(STRATEGIES)
    draft = None
    if strategy == "self-speculative":
        threshold = rng.choice([None, rng.uniform(0.05, 0.9)])
        draft = SelfSpeculation(rng.choice(exits), rng.randint(1, 5), threshold)
    settings: dict[str, float] = {}
    if rng.random() < 0.5:
        settings = {
            "temperature": rng.uniform(0.3, 1.5),
            "top_k": rng.choice([0, 5]),
            "top_p": rng.choice([1.0, 0.8]),
            "seed": rng.randrange(2**40),
            "min_p": rng.choice([0.0, 0.05]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
        }
    common = [rng.randrange(VOCABULARY) for _ in range(9)] if rng.random() < 0.3 else [7] * 9
    prompt = common + [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 8))]
    prompt = prompt[rng.randrange(9) :]
    policy, max_tokens = rng.choice(policies), rng.randint(1, 24)
    eos_token_ids, stop_token_ids = rng.choice([(), (3,), (5, 3)]), rng.choice([(), (5, 6)])
    more = random.Random(f"{id} {prompt}")
    params = SamplingParams(
        **settings,
        max_tokens=max_tokens,
        min_tokens=more.choice([0, 0, 0, min(4, max_tokens)]),
        stop_token_ids=stop_token_ids,
        ignore_eos=more.random() < 0.1,
        logprobs=more.choice([None, None, 2]),
    )
    contrast = random_contrast(more, strategy, config)
    if draft is not None and policy.measure == "agreement":
        draft = replace(draft, draft_threshold=None)
    return Request(
        id, tuple(prompt), policy, params, strategy, draft, eos_token_ids, contrast=contrast
    )


def random_traffic(rng: random.Random, config: Config) -> Traffic:
    policies = [random_policy(rng, config) for _ in range(rng.randint(1, 3))]
    count = rng.randint(1, 16)
    requests = [random_request(rng, f"r{i}", config, policies) for i in range(count)]
    arrivals = [rng.randrange(40) for _ in requests]
    aborted = [(a + rng.randrange(60), r.id) for a, r in zip(arrivals, requests, strict=True)]
    aborts: dict[int, list[str]] = {}
    for step, id in aborted:
        if rng.random() < 0.15:
            aborts.setdefault(step, []).append(id)
    return Traffic(requests, arrivals, aborts)


def expected(model: ReferenceModel, request: Request) -> RequestOutput:
    """Return the reference output of a request."""
    return generate_reference(
        model,
        request.prompt_token_ids,
        request.policy,
        request.sampling_params,
        request.strategy,
        request.eos_token_ids,
        contrast=request.contrast,
    )


def serve(engine: Engine, traffic: Traffic, check=lambda engine: None) -> dict[str, RequestOutput]:
    """Run the traffic and return the outputs; call `check` after every step."""
    made, step = {}, 0
    while step <= max(traffic.arrivals) or engine.has_work:
        for request, arrival in zip(traffic.requests, traffic.arrivals, strict=True):
            if arrival == step:
                engine.add(request)
        for id in traffic.aborts.get(step, []):
            if id in engine._sequences:
                made[id] = engine.abort(id)
        for output in engine.step():
            if output.request_output:
                made[output.request_id] = output.request_output
        check(engine)
        step += 1
        assert step < 20_000, "the engine does not come to an end"
    return made


def assert_expected(
    model: ReferenceModel, traffic: Traffic, made: dict[str, RequestOutput | None]
) -> None:
    """Assert that outputs equal the reference, or its beginning for aborted requests."""
    for request in traffic.requests:
        wanted, found = expected(model, request), made[request.id]
        if found is None:  # aborted before its first token
            continue
        count = len(found.token_ids)
        assert found.token_ids == wanted.token_ids[:count], request
        assert found.exits == wanted.exits[:count], request
        if found.finish_reason != "abort":
            assert (count, found.finish_reason) == (len(wanted.token_ids), wanted.finish_reason)
            assert found.confidences == pytest.approx(wanted.confidences, abs=1e-9)
            assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-9)


def random_engine(
    rng: random.Random,
    config: Config,
    seed: int,
    is_wild: bool = True,
    execution: ExecutionConfig | None = None,
) -> Engine:
    block_size = rng.choice([2, 4, 16])
    least = -(-config.model.max_seq_length // block_size) + 1
    scheduler_config = SchedulerConfig(
        max_num_seqs=rng.randint(1, 16),
        num_blocks=least + rng.choice([0, 3, 100]),
        block_size=block_size,
        max_pending=rng.choice([6, 9, 32]),
        max_num_batched_tokens=rng.choice([6, 40, 1000]),
        max_deferred_steps=rng.choice([1, 5]),
        max_piggyback_rows=rng.choice([0, 20]),
    )
    tensors = random_tensors(config, seed) | random_gates(config, seed)
    engine = Engine(
        config, tensors, torch.float64, scheduler_config, deferral="off", execution=execution
    )
    engine.scheduler.deferral_targets = [rng.randint(1, 5) for _ in engine.boundaries]
    if is_wild:
        engine.scheduler.__class__ = RandomScheduler
        engine.scheduler.random = rng
    return engine
