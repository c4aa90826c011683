"""Test random traffic and schedules: all tokens and exits equal the reference in float64."""

import random
from collections import deque
from dataclasses import replace

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution.runner import Runner
from ee_llm.inference.scheduling.scheduler import Scheduler
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.strategies import STRATEGIES
from ee_llm.inference.verification.reference_decoding import frozen_boundaries
from tests.unit.inference.engines import with_settings
from tests.unit.inference.fuzz import (
    RandomScheduler,
    Traffic,
    assert_expected,
    random_engine,
    random_traffic,
    serve,
)
from tests.unit.inference.models import Residuals, random_gates, random_tensors, tiny_config

pytestmark = pytest.mark.thorough

SEEDS = range(24)
HEADS = (
    ("norm",),
    ("mlp", "norm"),
    ("block", "norm"),
    ("block", "mlp", "translator", "norm"),
    ("translator", "norm"),
    (),
)


def _config(rng: random.Random):
    return tiny_config(
        rng.choice(["llama", "gpt"]),
        rng.choice([(1, 2), (1,), (2, 3), (1, 2, 3)]),
        rng.choice(HEADS),
        rng.choice(["own", "shared", "tied"]),
        num_kv_heads=rng.choice([1, 2, 4]),
    )


def _check_rings(engine: Engine, model: Residuals) -> None:
    """Assert that each ring contains the pending rows, equal to those of one forward pass."""
    size = engine.scheduler_config.max_pending
    for sequence in engine.scheduler.running:
        if sequence.watermarks[0] == 0:
            continue
        length = sequence.watermarks[0]
        left_at = frozen_boundaries(
            model, sequence.num_prompt, sequence.exits, sequence.request.strategy
        )
        left_at = left_at and left_at[:length]
        walk = dict(model.walk(torch.tensor(sequence.tokens[:length]), left_at))
        for segment, ring in enumerate(engine.runner._rings):
            for position in range(*reversed(sequence.watermarks[segment : segment + 2])):
                found = ring[sequence.slot * size + position % size]
                wanted = walk[engine.boundaries[segment]][position]
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def _run(seed: int, checks_rings: bool = False) -> set[str]:
    """Serve random traffic, check its outputs, and return the strategies that ran."""
    rng = random.Random(seed)
    config = _config(rng)
    tensors = random_tensors(config, seed) | random_gates(config, seed)
    model = ReferenceModel(config, tensors, torch.float64)
    residuals = Residuals(config, tensors, torch.float64)
    traffic = random_traffic(rng, config)
    engine = random_engine(rng, config, seed, is_wild=seed % 2 == 0)

    def check(engine: Engine) -> None:
        engine.scheduler.check_integrity()
        if checks_rings:
            _check_rings(engine, residuals)

    made = serve(engine, traffic, check)
    engine.scheduler.blocks.check_integrity([])
    assert not engine._sequences, "a request was forgotten"
    assert_expected(model, traffic, made)
    later = _continued(rng, traffic, made, config.model.max_seq_length)
    assert_expected(model, later, serve(engine, later, check))
    return {request.strategy for request in traffic.requests}


def _continued(rng: random.Random, traffic: Traffic, made, max_length: int) -> Traffic:
    """Return requests that continue earlier ones, as in a conversation."""
    requests = []
    for request in traffic.requests:
        answer = made[request.id].token_ids if made[request.id] else ()
        length = rng.randint(1, len(request.prompt_token_ids) + len(answer))
        prompt = (*request.prompt_token_ids, *answer)[: min(length, max_length - 1)]
        requests.append(
            with_settings(
                replace(request, prompt_token_ids=prompt),
                max_tokens=rng.randint(1, 6),
                min_tokens=0,
            )
        )
    return Traffic(requests[:5], [0] * len(requests[:5]), {})


def test_random_scheduler_replaces_methods_of_the_scheduler() -> None:
    """A method that the scheduler does not have would never be called."""
    replaced = {name for name in vars(RandomScheduler) if name.startswith("_")}
    assert {"_pick", "_ranges"} <= replaced & vars(Scheduler).keys()


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_and_exits_equal_the_reference(seed: int) -> None:
    _run(seed)


@pytest.mark.parametrize("seed", [100, 101, 102, 103])
def test_rings_hold_the_pending_rows_at_every_step(seed: int) -> None:
    _run(seed, checks_rings=True)


def _skip_first_pending_row(monkeypatch):
    """Plant a bug: the first pending row does not run deeper."""
    ranges = Scheduler._ranges

    def late(self, segment, carried=()):
        found = ranges(self, segment, carried)
        return [replace(s, start=s.start + 1) if segment and len(s) > 2 else s for s in found]

    monkeypatch.setattr(Scheduler, "_ranges", late)


def _ring_one_row_too_small(monkeypatch):
    """Plant a bug: a ring has space for one pending row too few."""
    init = Runner.__init__

    def short(self, *args):
        init(self, *args)
        self._num_pending -= 1

    monkeypatch.setattr(Runner, "__init__", short)


def _freeze_one_row_too_late(monkeypatch):
    """Plant a bug: `propagate` freezes the row after the one that exited."""
    is_frozen = Sequence.is_frozen
    monkeypatch.setattr(
        Sequence,
        "is_frozen",
        lambda self, position, segment: is_frozen(self, position - 1, segment),
    )


def _keep_row_of_rejected_draft(monkeypatch):
    """Plant a bug: the row of a rejected draft keeps the keys and values of the wrong token."""
    settle = Sequence.apply

    def careless(self, segment, result):
        marks, before = list(self.watermarks), self.num_rejections
        counts = settle(self, segment, result)
        if self.num_rejections > before:
            self.watermarks = [min(mark, len(self.tokens)) for mark in marks]
            self.watermarks[-1] = len(self.tokens) - 1  # its exit is still evaluated
        return counts

    monkeypatch.setattr(Sequence, "apply", careless)


def _share_frozen_blocks(monkeypatch):
    """Plant a bug: `propagate` shares blocks of new tokens, whose rows were frozen."""
    monkeypatch.setattr(Sequence, "num_reusable", property(lambda self: self.num_confirmed))


PLANTS = [
    _skip_first_pending_row,
    _ring_one_row_too_small,
    _freeze_one_row_too_late,
    _keep_row_of_rejected_draft,
    _share_frozen_blocks,
]


@pytest.mark.parametrize("plant", PLANTS)
def test_the_fuzz_test_finds_a_planted_bug(plant, monkeypatch) -> None:
    """The seeds above suffice to find each bug."""
    plant(monkeypatch)
    if plant is _skip_first_pending_row:  # rows read missing data, so it may crash first
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            deque(map(_run, SEEDS), maxlen=0)
    else:
        with pytest.raises(AssertionError):
            deque(map(_run, SEEDS), maxlen=0)


def test_the_fuzz_test_covers_preemption_and_all_strategies() -> None:
    """Otherwise, it would test too little."""
    rng = random.Random(0)
    config = tiny_config()
    engine = random_engine(rng, config, 0)
    assert isinstance(engine.scheduler, RandomScheduler)
    strategies = [
        request.strategy for _ in range(8) for request in random_traffic(rng, config).requests
    ]
    assert set(strategies) == set(STRATEGIES)
    serve(engine, random_traffic(random.Random(3), config))
    assert engine.scheduler.num_preemptions > 0
