"""Create tiny engines and requests, and check their outputs and final state."""

from collections.abc import Sequence as Items
from dataclasses import fields, replace

import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.inference.decoding.settings import CONTRASTS, Contrast, resolve_contrast
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation, Strategy
from ee_llm.inference.text.detokenizer import Detokenize
from tests.unit.inference.fuzz import expected
from tests.unit.inference.models import random_tensors, random_tokens, tiny_config

LIMITS = SchedulerConfig(
    max_num_seqs=8, num_blocks=65, block_size=4, max_pending=16, max_num_batched_tokens=64
)
DRAWN = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=4)
_SETTINGS = {field.name for field in fields(SamplingParams)}
# About half of the rows of a random model reach these thresholds.
THRESHOLDS = (0.35, 0.35)


def make_engine(
    config: Config | None = None,
    dtype: torch.dtype = torch.float64,
    detokenize: Detokenize | None = None,
    deferral: str = "off",
    tensors: dict | None = None,
    execution: ExecutionConfig | None = None,
    **scheduler_config: int,
) -> Engine:
    config = config or tiny_config()
    tensors = tensors or random_tensors(config)
    return Engine(
        config,
        tensors,
        dtype,
        replace(LIMITS, **scheduler_config),
        detokenize,
        deferral=deferral,
        execution=execution,
    )


def make_request(
    id: str = "a",
    num_prompt: int = 5,
    strategy: Strategy = "exact",
    thresholds: Items[float | None] = THRESHOLDS,
    boundaries: Items[int] = (1, 2),
    draft: SelfSpeculation | None = None,
    prompt: Items[int] | None = None,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008
    contrast: Contrast | None = None,
    **options: object,
) -> Request:
    """Return a request whose prompt depends only on its id and length."""
    if prompt is None:
        prompt = random_tokens(num_prompt, seed=sum(id.encode())).tolist()
    if strategy == "self-speculative" and draft is None:
        draft = SelfSpeculation(boundaries[0], 3)
    if strategy in CONTRASTS:
        config = tiny_config(boundaries=boundaries)
        contrast = resolve_contrast(contrast or CONTRASTS[strategy](), config)
    policy = make_exit_policy(boundaries, thresholds)
    settings = {"max_tokens": 12} | {name: options.pop(name) for name in _SETTINGS & {*options}}
    params = replace(sampling, **settings)
    return Request(id, tuple(prompt), policy, params, strategy, draft, contrast=contrast, **options)


def with_settings(request: Request, id: str | None = None, **settings: object) -> Request:
    """Return a copy with changed sampling parameters and, if given, another id."""
    params = replace(request.sampling_params, **settings)
    return replace(request, id=id or request.id, sampling_params=params)


def one_of_each(**options: object) -> list[Request]:
    """Return one request for each strategy."""
    return [
        make_request(strategy, 3 + 2 * index, strategy, **options)
        for index, strategy in enumerate(STRATEGIES)
    ]


def reference(
    request: Request, config: Config | None = None, tensors: dict | None = None
) -> RequestOutput:
    """Return the reference output of a request in float64."""
    config = config or tiny_config()
    model = ReferenceModel(config, tensors or random_tensors(config), torch.float64)
    return expected(model, request)


def serve(engine: Engine, requests: Items[Request]) -> tuple[list[RequestOutput], list[Sequence]]:
    """Run requests and return outputs and sequences; check the engine after every step."""
    for request in requests:
        engine.add(request)
    sequences = [engine._sequences[request.id] for request in requests]
    made = {}
    while engine.has_work:
        for output in engine.step():
            if output.request_output:
                made[output.request_id] = output.request_output
        engine.scheduler.check_integrity()
    assert_idle(engine)
    return [made[request.id] for request in requests], sequences


def assert_same(found: RequestOutput, expected: RequestOutput) -> None:
    """Assert that tokens and exits are equal, and the other values up to float64 rounding."""
    assert found.token_ids == expected.token_ids
    assert found.exits == expected.exits
    assert found.finish_reason == expected.finish_reason
    for ours, theirs in (
        (found.confidences, expected.confidences),
        (found.logprobs, expected.logprobs),
    ):
        torch.testing.assert_close(
            torch.tensor(ours, dtype=torch.float64),
            torch.tensor(theirs, dtype=torch.float64),
            rtol=0,
            atol=1e-9,
        )


def assert_idle(engine: Engine) -> None:
    """Assert that the engine has no request and that all slots and blocks are free."""
    assert not engine.has_work
    assert not engine._sequences
    assert not engine._num_reported
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    engine.scheduler.check_integrity()
    blocks = engine.scheduler.blocks
    blocks.check_integrity([])
    assert blocks.num_available == blocks.num_blocks - 1
