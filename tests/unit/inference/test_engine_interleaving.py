"""Test random calls and failures: each caller gets its outputs exactly once."""

import random
from collections import defaultdict
from contextlib import suppress

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.engine_base import OutputStream
from ee_llm.inference.outputs import RequestOutput, StepOutput
from ee_llm.inference.request import Request
from ee_llm.inference.scheduling.output import SchedulerOutput
from tests.unit.inference.engines import assert_idle, make_engine
from tests.unit.inference.fuzz import expected, random_policy, random_request
from tests.unit.inference.models import random_gates, random_tensors, tiny_config

pytestmark = pytest.mark.thorough


class OutOfMemory(RuntimeError):
    """An error planted during a pass."""


class User:
    """Call an engine at random, and record the outputs of each request."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.config = tiny_config()
        self.tensors = random_tensors(self.config, seed) | random_gates(self.config, seed)
        self.engine = make_engine(self.config, tensors=self.tensors, num_blocks=14)
        self.policies = [random_policy(self.rng, self.config) for _ in range(2)]
        self.requests: dict[str, Request] = {}
        self.added: set[str] = set()
        self.streams: dict[str, OutputStream] = {}
        self.got: dict[str, list[StepOutput]] = defaultdict(list)
        self.num_failures = 0
        run = self.engine.runner.run

        def fails_sometimes(scheduler_output: SchedulerOutput) -> torch.Tensor:
            self._fail_sometimes()
            logits = run(scheduler_output)
            self._fail_sometimes()
            return logits

        self.engine.runner.run = fails_sometimes

    def _fail_sometimes(self) -> None:
        if self.rng.random() < 0.03:
            self.num_failures += 1
            raise self.rng.choice([OutOfMemory, KeyboardInterrupt])

    def request(self) -> Request:
        id = f"r{len(self.requests)}"
        self.requests[id] = random_request(self.rng, id, self.config, self.policies)
        return self.requests[id]

    def act(self) -> None:
        """Make one random call. A failure ends at most the request of this call."""
        actions = [self.add, self.open_stream, self.read_stream, self.drop_stream, self.abort]
        with suppress(OutOfMemory, KeyboardInterrupt):
            self.rng.choice([*actions, *[self.step] * 8, *[self.read_stream] * 3, self.generate])()
        self.engine.scheduler.check_integrity()

    def add(self) -> None:
        request = self.request()
        self.engine.add(request)
        self.added.add(request.id)

    def step(self) -> None:
        for output in self.engine.step():
            assert output.request_id in self.added, "somebody else's update"
            self.got[output.request_id].append(output)

    def open_stream(self) -> None:
        request = self.request()
        self.streams[request.id] = self.engine.stream(request)

    def read_stream(self) -> None:
        if not self.streams:
            return
        id = self.rng.choice(sorted(self.streams))
        try:
            output = next(self.streams[id], None)
        except BaseException:
            del self.streams[id]
            raise
        if output is None:
            del self.streams[id]
        else:
            assert output.request_id == id
            self.got[id].append(output)

    def drop_stream(self) -> None:
        if self.streams and self.rng.random() < 0.5:
            self.streams.pop(self.rng.choice(sorted(self.streams)))

    def abort(self) -> None:
        running = sorted(self.added & self.engine._sequences.keys())
        if running and self.rng.random() < 0.3:
            id = self.rng.choice(running)
            self.added.remove(id)
            count = sum(len(output.tokens) for output in self.got[id])
            partial = self.engine.abort(id)
            assert len(partial.token_ids if partial else ()) >= count

    def generate(self) -> None:
        requests = [self.request() for _ in range(self.rng.randint(1, 3))]
        self.engine.generate(requests, lambda output: self.got[output.request_id].append(output))

    def finish(self) -> None:
        while self.engine.has_work or self.streams:
            with suppress(OutOfMemory, KeyboardInterrupt):
                self.step()
                self.read_stream()


def _check(outputs: list[StepOutput], wanted: RequestOutput, must_end: bool) -> None:
    tokens = [token_output.token_id for output in outputs for token_output in output.tokens]
    exits = [token_output.exit for output in outputs for token_output in output.tokens]
    assert tuple(tokens) == wanted.token_ids[: len(tokens)]
    assert tuple(exits) == wanted.exits[: len(exits)]
    ends = [output.request_output for output in outputs if output.request_output]
    assert len(ends) <= 1
    assert not must_end or ends
    if ends:
        assert outputs[-1].request_output is ends[0]
        assert ends[0].token_ids == wanted.token_ids == tuple(tokens)
        assert ends[0].finish_reason == wanted.finish_reason


@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_its_own_outputs_despite_other_calls_and_failures(seed: int) -> None:
    """Streams are opened, read and dropped; passes run out of memory or are interrupted."""
    user = User(seed)
    for _ in range(200):
        user.act()
    user.finish()
    assert_idle(user.engine)
    assert user.num_failures > 0
    model = ReferenceModel(user.config, user.tensors, torch.float64)
    for id, request in user.requests.items():
        _check(user.got[id], expected(model, request), must_end=id in user.added)
