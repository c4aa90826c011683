"""The engine over tensor-parallel ranks and pipeline stages: the same tokens and exits."""

import dataclasses
import itertools
import math
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.inference.choices import MEASURES
from ee_llm.inference.decoding.settings import SLED, DoLa, resolve_contrast, strategy_of
from ee_llm.inference.engine import Engine
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.execution import early_rows
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.pipeline_engine import PipelineEngine
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation
from ee_llm.inference.verification.certificate import verify_trace
from tests.distributed.harness import run_ranks
from tests.unit.inference.engines import make_request
from tests.unit.inference.fuzz import (
    RANGES,
    Traffic,
    assert_expected,
    expected,
    random_traffic,
    serve,
)
from tests.unit.inference.models import VOCABULARY, random_gates, random_tensors, tiny_config
from tests.unit.inference.poison import poisoned_traffic

LAYOUTS = [(2, 1), (1, 2), (2, 2), (1, 4)]


def _setting(seed: int):
    rng = random.Random(seed)
    head = rng.choice([("norm",), ("mlp", "norm"), ("block", "norm"), ("block", "mlp", "norm")])
    family, output = rng.choice(["llama", "gpt"]), rng.choice(["own", "shared", "tied"])
    boundaries = rng.choice([(1, 2), (1,), (2, 3), (1, 2, 3), (2,)])
    config = tiny_config(family, boundaries, head, output, num_kv_heads=rng.choice([2, 4]))
    return rng, config, random_tensors(config, seed) | random_gates(config, seed)


def _limits(rng: random.Random) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=rng.randint(1, 8),
        num_blocks=rng.choice([10, 40]),
        block_size=4,
        max_pending=rng.choice([6, 32]),
        max_num_batched_tokens=rng.choice([6, 40]),
    )


def make_engine(
    config, tensors, scheduler_config, ranks: distributed.InferenceGrid, **options
) -> EngineBase:
    if ranks.num_stages > 1:
        return PipelineEngine(config, tensors, ranks, torch.float64, scheduler_config, **options)
    return Engine(
        config, tensors, torch.float64, scheduler_config, deferral="off", ranks=ranks, **options
    )


def _serve(seed: int, tensor: int, pipeline: int) -> dict[str, RequestOutput] | None:
    torch.set_num_threads(1)
    rng, config, tensors = _setting(seed)
    traffic = random_traffic(rng, config)
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=30)
    engine = make_engine(config, tensors, _limits(rng), ranks)
    if not ranks.is_leader:
        engine.worker_loop()
        return None
    made = serve(engine, traffic, lambda engine: engine.scheduler.check_integrity())
    engine.close()
    engine.scheduler.blocks.check_integrity([])
    return made


def _traffic(seed: int) -> tuple[Traffic, ReferenceModel]:
    rng, config, tensors = _setting(seed)
    return random_traffic(rng, config), ReferenceModel(config, tensors, torch.float64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_tokens_and_exits_equal_the_reference(tensor: int, pipeline: int, seed: int) -> None:
    """Mixes all strategies, arrivals and aborts; drafts are rejected after later rows are sent."""
    made, *nothing = run_ranks(tensor * pipeline, _serve, seed, tensor, pipeline)
    assert nothing == [None] * (tensor * pipeline - 1)
    traffic, model = _traffic(seed)
    assert_expected(model, traffic, made)


def _measured(head: str) -> tuple[Config, dict[str, torch.Tensor], list[Request]]:
    """Return a model, and requests of every measure and strategy that use exits."""
    config = tiny_config(boundaries=(1, 2, 3), head=tuple(head.split("-")))
    rng = random.Random(head)
    requests = []
    for measure, strategy in itertools.product(
        MEASURES, ("exact", "propagate", "self-speculative")
    ):
        lowest, highest = RANGES.get(measure, (0.05, 0.9))
        thresholds = [rng.uniform(lowest, highest) for _ in range(3)]
        policy = make_exit_policy((1, 2, 3), thresholds, measure)
        draft = None
        if strategy == "self-speculative":
            draft = SelfSpeculation(2, 3, None if measure == "agreement" else thresholds[1])
        for index in range(2):
            prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9)))
            params = SamplingParams(max_tokens=12, temperature=index, seed=index)
            id = f"{measure} {strategy} {index}"
            requests.append(Request(id, prompt, policy, params, strategy, draft))
    return config, random_tensors(config) | random_gates(config), requests


def _serve_measured(head: str, tensor: int, pipeline: int) -> list[RequestOutput]:
    torch.set_num_threads(1)
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=30)
    config, tensors, requests = _measured(head)
    engine = make_engine(config, tensors, SchedulerConfig(max_num_seqs=5, block_size=4), ranks)
    if not ranks.is_leader:
        engine.worker_loop()
        return []
    made = engine.generate(requests)
    engine.close()
    return made


@pytest.mark.parametrize("head", ["norm", "block-norm"])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_every_measure_of_confidence_gives_the_same_over_ranks(
    tensor: int, pipeline: int, head: str
) -> None:
    """Some decide before the logits, some compare exits, which may be on different stages."""
    outputs, *_ = run_ranks(tensor * pipeline, _serve_measured, head, tensor, pipeline)
    config, tensors, requests = _measured(head)
    model = ReferenceModel(config, tensors, torch.float64)
    assert_expected(model, Traffic(requests, [], {}), {one.request_id: one for one in outputs})
    for output in outputs:
        assert verify_trace(model, output) == []
    for measure in ("agreement", "shortlist", "saturation", "gate"):
        of_measure = [one for one in outputs if one.policy.measure == measure]
        taken = {exit for one in of_measure if one.strategy == "exact" for exit in one.exits}
        assert len(taken) >= 2, f"{measure}: the test needs tokens of several exits"


def _serve_poisoned(seed: int, tensor: int, pipeline: int) -> list[RequestOutput]:
    torch.set_num_threads(1)
    traffic = poisoned_traffic(seed)
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=30)
    scheduler_config = SchedulerConfig(
        max_num_seqs=4, num_blocks=33, block_size=4, max_pending=16, max_num_batched_tokens=64
    )
    engine = make_engine(traffic.config, traffic.tensors, scheduler_config, ranks)
    if not ranks.is_leader:
        engine.worker_loop()
        return []
    made = [*engine.generate(traffic.requests), *engine.generate(traffic.requests)]
    engine.close()
    engine.scheduler.blocks.check_integrity([])
    return made


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_requests_end_at_the_first_nan(tensor: int, pipeline: int, seed: int) -> None:
    """In a prompt, a sampled token or a draft; a rejected draft ends nothing."""
    traffic = poisoned_traffic(seed)
    made, *_ = run_ranks(tensor * pipeline, _serve_poisoned, seed, tensor, pipeline)
    count = len(traffic.requests)
    traffic.check(made[:count])
    traffic.check(made[count:])


def _fail_to_connect() -> bool:
    dist.new_group = lambda *arguments, **options: 1 / 0
    with pytest.raises(ZeroDivisionError):
        distributed.connect_serving()
    return dist.is_initialized()


def test_failed_connection_leaves_no_process_group() -> None:
    assert run_ranks(1, _fail_to_connect) == [False]


def _contrast_requests(config: Config) -> list[Request]:
    """Return requests of `sled` and `dola` with early layers on every stage, and an exact one."""
    contrasts = [
        SLED(rate=3.0, layers=(0, 1, 3)),
        DoLa(layers=(0, 1, 3)),
        SLED(variant="released", scale=5),
        SLED(head="exits", rate=4.0, scale=40),
        DoLa(layers=(0, 1, 2, 3), alpha=0.02),
        DoLa(layers=(2,), head="exits"),
        DoLa(layers="high", head="raw"),
    ]
    return [
        make_request("exact", max_tokens=16),
        *(
            make_request(
                f"{number}",
                3 + 2 * number,
                strategy_of(contrast),
                contrast=resolve_contrast(contrast, config),
                sampling=SamplingParams(temperature=0.8 * (number % 2), top_k=9, seed=number),
            )
            for number, contrast in enumerate(contrasts)
        ),
    ]


def _serve_contrasts(
    tensor: int, pipeline: int, head: tuple[str, ...], max_logits: int
) -> list[RequestOutput]:
    """Return the outputs of all requests together, then of one at a time."""
    torch.set_num_threads(1)
    early_rows.MAX_LOGITS = max_logits
    config = tiny_config(head=head, output="own")
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=30)
    scheduler_config = SchedulerConfig(max_num_seqs=4, num_blocks=40, block_size=4, max_pending=5)
    engine = make_engine(config, random_tensors(config), scheduler_config, ranks)
    if not ranks.is_leader:
        engine.worker_loop()
        return []
    requests = _contrast_requests(config)
    made = engine.generate(requests)
    made += [engine.generate([request])[0] for request in requests]
    engine.close()
    return made


@pytest.mark.parametrize(
    ("tensor", "pipeline", "head", "max_logits"),
    [
        *(
            (*layout, head, early_rows.MAX_LOGITS)
            for layout in LAYOUTS
            for head in (("norm",), ("block", "mlp", "norm"))
        ),
        (2, 1, ("norm",), 1),  # the early logits of each row by themselves
        (1, 2, ("norm",), 1),
    ],
)
def test_early_logits_of_all_stages_are_contrasted(
    tensor: int, pipeline: int, head: tuple[str, ...], max_logits: int
) -> None:
    """Early layers are on stages before the last one, and vocabularies are divided."""
    made, *_ = run_ranks(tensor * pipeline, _serve_contrasts, tensor, pipeline, head, max_logits)
    config = tiny_config(head=head, output="own")
    model = ReferenceModel(config, random_tensors(config), torch.float64)
    requests = _contrast_requests(config)
    for request, together, alone in zip(
        requests, made[: len(requests)], made[len(requests) :], strict=True
    ):
        wanted = expected(model, request)
        assert together.token_ids == alone.token_ids == wanted.token_ids
        assert together.logprobs == pytest.approx(wanted.logprobs, abs=1e-9)
        assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-12)


def _fail_amid_a_pass(kind: type[BaseException], tensor: int, pipeline: int, noticed: Path) -> str:
    _, config, tensors = _setting(0)
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=100)
    engine = make_engine(config, tensors, SchedulerConfig(), ranks)
    if not ranks.is_leader:
        with pytest.raises(distributed.RankLostError):
            engine.worker_loop()
        noticed.touch()
        return "lost"
    run, passes = ModelStage.run, itertools.count()

    def fail_at_third(self: ModelStage, *arguments: object) -> object:
        if next(passes) == 3:
            raise kind("out of memory")
        return run(self, *arguments)

    if isinstance(engine, PipelineEngine):
        engine._runner._executor.run = fail_at_third.__get__(engine._runner._stage)
    else:
        engine.runner._executor.run = fail_at_third.__get__(engine.runner.stage)
    with pytest.raises(kind, match="out of memory"):
        engine.generate([_request(config)])
    with pytest.raises(RuntimeError, match="ended by an exception"):
        engine.generate([_request(config)])
    engine.close()
    with pytest.raises(RuntimeError, match="ended by an exception"):
        engine.generate([_request(config)])
    while not noticed.exists():  # this process must not exit first
        time.sleep(0.05)
    return "failed"


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_exception_in_a_pass_ends_all_ranks_before_the_timeout(
    tmp_path: Path, tensor: int, pipeline: int, kind: type[BaseException]
) -> None:
    """The ranks are out of step then, and none may wait a hundred seconds for a message."""
    arguments = (kind, tensor, pipeline, tmp_path / "noticed")
    ended = run_ranks(2, _fail_amid_a_pass, *arguments, timeout_s=50)
    assert ended == ["failed", "lost"]


def _close_after_a_loss(tensor: int, pipeline: int) -> str:
    _, config, tensors = _setting(0)
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=20)
    engine = make_engine(config, tensors, SchedulerConfig(), ranks)
    if not ranks.is_leader:
        return "lost"
    time.sleep(2)
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 10
    return "closed"


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_close_succeeds_after_a_rank_is_lost(tensor: int, pipeline: int) -> None:
    assert run_ranks(2, _close_after_a_loss, tensor, pipeline) == ["closed", "lost"]


def _events(strategy: str) -> list[str]:
    """Return the order in which the first of two stages sends a row and evaluates its exit."""
    config = tiny_config(boundaries=(2,))
    ranks = distributed.connect_serving(pipeline=2, timeout_s=30)
    engine = make_engine(config, random_tensors(config), SchedulerConfig(), ranks)
    if not ranks.is_leader:
        engine.worker_loop()
        return []
    events: list[str] = []

    def record(kind: type, name: str) -> None:
        function = getattr(kind, name)

        def call(self: object, *arguments: object) -> object:
            events.append(name)
            return function(self, *arguments)

        setattr(kind, name, call)

    record(distributed.InferenceGrid, "send_next")
    record(ModelStage, "logits")
    engine.generate([dataclasses.replace(_request(config), strategy=strategy)])
    engine.close()
    return events


@pytest.mark.parametrize(
    ("strategy", "order"),
    [("exact", ["send_next", "logits"]), ("propagate", ["logits", "send_next"])],
)
def test_next_stage_does_not_wait_for_an_exit(strategy: str, order: list[str]) -> None:
    """Except with `propagate`, where an exited row keeps its hidden state from there on."""
    events, _ = run_ranks(2, _events, strategy)
    assert events[:2] == order


_POISON = 28


def _serve_poison(tensor: int, pipeline: int) -> dict[str, RequestOutput]:
    """Serve requests of all strategies, half of them with a token whose embedding is NaN."""
    torch.set_num_threads(1)
    config = tiny_config(boundaries=(1, 2))
    tensors = random_tensors(config)
    tensors["embedding.word.weight"][_POISON] = math.nan
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=30)
    # With few blocks, other requests reuse those of requests with NaN.
    scheduler_config = SchedulerConfig(max_num_seqs=3, num_blocks=17, block_size=4)
    engine = make_engine(config, tensors, scheduler_config, ranks)
    if not ranks.is_leader:
        engine.worker_loop()
        return {}
    made: dict[str, RequestOutput] = {}
    for request in _poisoned_requests():
        engine.add(request)
    while engine.has_work:
        made |= {one.request_id: one.request_output for one in engine.step() if one.request_output}
        engine.scheduler.check_integrity()
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 15, "close waits for a result that never arrives"
    return made


def _poisoned_requests() -> list[Request]:
    requests = []
    for number in range(24):
        strategy = STRATEGIES[number // 2 % len(STRATEGIES)]
        prompt = [1 + number, 2, 3, *range(4, 4 + number % 5)]
        if number % 2:
            prompt[number % len(prompt)] = _POISON
        requests.append(make_request(f"{number}", prompt=prompt, strategy=strategy, max_tokens=8))
    return requests


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_requests_with_nan_end_without_the_others(tensor: int, pipeline: int) -> None:
    """A stage used to raise at NaN, and the others waited until the timeout."""
    made, *_ = run_ranks(tensor * pipeline, _serve_poison, tensor, pipeline)
    config = tiny_config(boundaries=(1, 2))
    model = ReferenceModel(config, random_tensors(config), torch.float64)
    for request in _poisoned_requests():
        found = made[request.id]
        if _POISON in request.prompt_token_ids:
            assert (found.token_ids, found.finish_reason) == ((), "error")
        else:
            wanted = expected(model, request)
            assert _POISON not in wanted.token_ids
            assert (found.token_ids, found.exits) == (wanted.token_ids, wanted.exits)


def _idle(tensor: int, pipeline: int) -> list[tuple[int, ...]]:
    _, config, tensors = _setting(0)
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=2)
    engine = make_engine(config, tensors, SchedulerConfig(), ranks)
    if not ranks.is_leader:
        engine.worker_loop()
        return []
    time.sleep(4)
    stream = engine.stream(_request(config))
    streamed = list(next(stream).tokens)
    time.sleep(4)
    streamed += [token for output in stream for token in output.tokens]
    (made,) = engine.generate([_request(config)])
    engine.close()
    return [tuple(token.token_id for token in streamed), made.token_ids]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_idle_ranks_do_not_time_out(tensor: int, pipeline: int) -> None:
    """The pauses, without a request and within a stream, are longer than the timeout."""
    (streamed, generated), *_ = run_ranks(tensor * pipeline, _idle, tensor, pipeline)
    assert len(generated) == 20
    assert streamed == generated


def _lose(tensor: int, pipeline: int, lost: int, hangs_s: float) -> float:
    _, config, tensors = _setting(0)
    ranks = distributed.connect_serving(tensor=tensor, pipeline=pipeline, timeout_s=4)
    engine = make_engine(config, tensors, SchedulerConfig(), ranks)
    if ranks.stage * tensor + ranks.tensor_rank == lost:
        time.sleep(hangs_s)
        return 0.0
    start = time.monotonic()
    with pytest.raises(distributed.RankLostError, match="lost another rank|no stage sent"):
        _serve_for_ever(engine, config) if ranks.is_leader else engine.worker_loop()
    return time.monotonic() - start


def _serve_for_ever(engine: EngineBase, config: Config) -> None:
    for number in itertools.count():
        engine.generate([dataclasses.replace(_request(config), id=f"{number}")])


_DIES, _HANGS = 0.5, 12.0


@pytest.mark.parametrize(
    ("tensor", "pipeline", "lost", "hangs_s"),
    [
        (2, 1, 1, _DIES),
        (2, 1, 0, _DIES),
        (2, 1, 1, _HANGS),
        (1, 2, 1, _HANGS),
        (1, 2, 0, _DIES),
        (2, 2, 3, _DIES),
    ],
)
def test_all_ranks_end_when_one_is_lost(
    tensor: int, pipeline: int, lost: int, hangs_s: float
) -> None:
    """None of the others may still wait some seconds after the timeout of four.

    A leader that hangs does not end the others: it looks like an idle one.
    """
    waited = run_ranks(tensor * pipeline, _lose, tensor, pipeline, lost, hangs_s)
    assert max(waited) < 11


def _request(config: Config) -> Request:
    policy = make_exit_policy(config.exits.boundaries, [0.3])
    return Request("one", (1, 2, 3), policy, SamplingParams(max_tokens=20))
