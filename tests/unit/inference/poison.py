"""Create a model with one token whose embedding is NaN, and check requests with this token."""

import math
import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation
from tests.unit.inference.engines import make_request
from tests.unit.inference.fuzz import expected
from tests.unit.inference.models import random_tensors, tiny_config

DRAWN = SamplingParams(temperature=0.9, top_k=20, seed=4)


@dataclass(frozen=True)
class PoisonedTraffic:
    """Requests to the model with NaN.

    Attributes:
        poison: The token whose embedding is NaN.
        wanted: The output of each request for the same model without NaN.
    """

    config: Config
    tensors: dict[str, Tensor]
    poison: int
    requests: list[Request]
    wanted: list[RequestOutput]

    def check(self, made: Items[RequestOutput]) -> None:
        """Assert that requests end at the token, and that other requests are not affected."""
        for request, found, wanted in zip(self.requests, made, self.wanted, strict=True):
            count = len(wanted.token_ids)
            if self.poison in request.prompt_token_ids:
                count = 0
            elif self.poison in wanted.token_ids[:-1]:
                count = wanted.token_ids.index(self.poison) + 1
            assert found.token_ids == wanted.token_ids[:count], request
            assert found.exits == wanted.exits[:count], request
            if count < len(wanted.token_ids):
                assert found.finish_reason == "error"
                assert "logits that are not finite" in str(found.error)
            else:
                assert (found.finish_reason, found.error) == (wanted.finish_reason, None)


def poisoned_traffic(seed: int) -> PoisonedTraffic:
    """Return requests of all strategies; some have the token in the prompt, others sample it."""
    rng = random.Random(seed)
    config = tiny_config(boundaries=(1, 2), num_kv_heads=rng.choice([2, 4]))
    tensors = random_tensors(config, seed)
    requests = []
    for number in range(12):
        strategy = STRATEGIES[number % 4]
        length = rng.randint(1, 18)
        prompt = [rng.randrange(40) for _ in range(length)] if number % 3 else [5] * length
        requests.append(
            make_request(
                f"{number}",
                strategy=strategy,
                prompt=prompt,
                draft=SelfSpeculation(rng.choice([1, 2]), rng.randint(1, 4))
                if strategy == "self-speculative"
                else None,
                sampling=rng.choice([SamplingParams(), DRAWN]),
                max_tokens=rng.randint(1, 14),
            )
        )
    model = ReferenceModel(config, tensors, torch.float64)
    wanted = [expected(model, request) for request in requests]
    drawn = [token for one in wanted for token in set(one.token_ids[:-1])]
    # Choose a token that some but not all requests sample, and add it to some prompts.
    poison = min(set(drawn), key=lambda token: abs(drawn.count(token) - 4))
    for index in (2, 7):
        prompt = [*requests[index].prompt_token_ids]
        prompt[rng.randrange(len(prompt))] = poison
        requests[index] = replace(requests[index], prompt_token_ids=tuple(prompt))
        wanted[index] = expected(model, requests[index])
    tensors["embedding.word.weight"][poison] = math.nan
    traffic = PoisonedTraffic(config, tensors, poison, requests, wanted)
    assert any(poison in one.token_ids[:-1] for one in wanted)
    assert any(poison not in (*one.prompt_token_ids, *one.token_ids) for one in wanted)
    return traffic
