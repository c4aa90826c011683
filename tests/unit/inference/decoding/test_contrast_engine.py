"""`sled` and `dola` in the engine: their logits, batches, certificate and errors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.inference.decoding.contrast import contrast_logits
from ee_llm.inference.decoding.settings import SLED, Contrast, DoLa, resolve_contrast, strategy_of
from ee_llm.inference.decoding.sled import evolve
from ee_llm.inference.execution import early_rows
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.verification.certificate import Divergence, tolerance, verify_trace
from ee_llm.inference.verification.contrasted import (
    ContrastedRow,
    contrast_margin,
    contrasted_logits,
)
from tests.unit.inference.engines import (
    DRAWN,
    assert_same,
    make_engine,
    make_request,
    reference,
    serve,
)
from tests.unit.inference.models import random_tensors, random_tokens, tiny_config

CONTRASTS = [
    SLED(),
    SLED(rate=4.0, scale=5, layers=(0, 3), tau=0.8),
    SLED(variant="released", rate=3.0),
    SLED(head="exits", rate=5.0, scale=40),
    DoLa(),
    DoLa(layers="high", alpha=0.02),
    DoLa(layers=(0, 1, 2, 3), head="raw"),
    DoLa(layers=1, head="exits", alpha=0.3),
]
IDS = [str(number) for number in range(len(CONTRASTS))]


def _request(contrast: Contrast, id: str = "a", **options: object) -> Request:
    return make_request(id, strategy=strategy_of(contrast), contrast=contrast, **options)


def _shortened(config: Config, tensors: dict[str, Tensor], num_layers: int) -> ReferenceModel:
    """Return the first layers of a model, followed by its final norm and output weight."""
    last = f"exits.{config.model.num_layers}."
    short = tiny_config(num_layers=num_layers, boundaries=())
    kept = {
        name.replace(last, f"exits.{num_layers}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(("embedding.", "output.", last))
        or (name.startswith("layers.") and int(name.split(".")[1]) <= num_layers)
    }
    return ReferenceModel(short, kept, torch.float64)


def test_early_logits_are_those_of_a_model_that_ends_there() -> None:
    config, tokens = tiny_config(), random_tokens(9)
    tensors = random_tensors(config)
    model = ReferenceModel(config, tensors, torch.float64)
    contrast = DoLa(layers=(1, 2, 3))
    rows = list(contrasted_logits(model, tokens, contrast, slice(4, 9)))
    assert len(rows) == 5
    for index, boundary in enumerate(contrast.layers):
        expected = _shortened(config, tensors, boundary).forward(tokens)[boundary][4:]
        torch.testing.assert_close(torch.stack([row.early[index] for row in rows]), expected)
    final = model.forward(tokens)
    torch.testing.assert_close(torch.stack([row.final for row in rows]), final[4][4:])
    at_exits = contrasted_logits(model, tokens, DoLa(head="exits"), slice(8, 9))
    torch.testing.assert_close(next(at_exits).early, torch.stack([final[1][8], final[2][8]]))


def test_raw_head_omits_the_norm_and_reads_the_embedding() -> None:
    config, tokens = tiny_config(), random_tokens(3)
    tensors = random_tensors(config)
    model = ReferenceModel(config, tensors, torch.float64)
    (row,) = contrasted_logits(model, tokens, DoLa(layers=0, head="raw"), slice(2, 3))
    expected = tensors["output.weight"] @ tensors["embedding.word.weight"][tokens[2]]
    torch.testing.assert_close(row.early[0], expected)
    torch.testing.assert_close(
        row.logits, contrast_logits(row.final[None], row.early[None], [DoLa(layers=0)])[0]
    )


@pytest.mark.parametrize("contrast", CONTRASTS, ids=IDS)
@pytest.mark.parametrize("head", [("norm",), ("block", "mlp", "norm")], ids="-".join)
@pytest.mark.parametrize("max_logits", [early_rows.MAX_LOGITS, 1], ids=["whole", "split"])
def test_tokens_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, max_logits: int, head: tuple[str, ...], contrast: Contrast
) -> None:
    """Greedy and drawn, beside exits that stop passes early, and with few blocks.

    With `max_logits` = 1, the early logits of each row are computed by themselves.
    """
    monkeypatch.setattr(early_rows, "MAX_LOGITS", max_logits)
    config = tiny_config(head=head)
    requests = [
        make_request("exact", 7),
        _request(contrast, "greedy", num_prompt=9),
        _request(contrast, "drawn", sampling=DRAWN),
        _request(
            contrast,
            "penalised",
            num_prompt=2,
            sampling=SamplingParams(repetition_penalty=1.3, min_tokens=4, logprobs=2),
            eos_token_ids=(3, 7, 11),
        ),
    ]
    made, _ = serve(make_engine(config, num_blocks=17, max_pending=4), requests)
    for request, output in zip(requests, made, strict=True):
        assert_same(output, reference(request, config))
        assert output.contrast == request.contrast
    assert set(made[1].exits) == {4}
    full = reference(replace(requests[1], strategy="full", contrast=None), config)
    assert made[1].confidences != full.confidences


def test_other_requests_do_not_change_a_token() -> None:
    """All settings at once, and one at a time."""
    requests = [
        _request(contrast, f"{number}", num_prompt=3 + number)
        for number, contrast in enumerate(CONTRASTS)
    ]
    together, _ = serve(make_engine(), requests)
    alone = [serve(make_engine(), [request])[0][0] for request in requests]
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("contrast", [SLED(), DoLa()], ids=["sled", "dola"])
def test_models_without_exits_can_be_contrasted(contrast: Contrast) -> None:
    config = tiny_config(boundaries=())
    request = _request(contrast, boundaries=(), thresholds=())
    (made,), _ = serve(make_engine(config), [request])
    assert_same(made, reference(request, config))


def test_prompts_are_shared_with_other_strategies() -> None:
    """All rows pass all layers, so cached blocks do not depend on the strategy."""
    prompt = random_tokens(13, seed=8).tolist()
    requests = [
        make_request("full", prompt=prompt, strategy="full"),
        _request(SLED(), "sled", prompt=prompt),
        _request(DoLa(), "dola", prompt=prompt),
    ]
    engine = make_engine()
    for number, request in enumerate(requests):
        (made,), (sequence,) = serve(engine, [request])
        assert_same(made, reference(request))
        assert sequence.num_cached == (12 if number else 0)


@pytest.mark.parametrize("sampling", [SamplingParams(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("contrast", CONTRASTS, ids=IDS)
def test_certificate_finds_any_other_token(contrast: Contrast, sampling: SamplingParams) -> None:
    config = tiny_config()
    model = ReferenceModel(config, random_tensors(config), torch.float64)
    output = reference(_request(contrast, sampling=sampling, max_tokens=6))
    assert verify_trace(model, output) == []
    for index in (0, 3, 5):
        token = output.token_ids[index]
        other = (token + 1) % config.model.vocab_size
        tokens = (*output.token_ids[:index], other, *output.token_ids[index + 1 :])
        first, *_ = verify_trace(model, replace(output, token_ids=tokens))
        assert (first.index, first.kind) == (index, "token")
        assert (first.found, first.expected) == (other, token)
        assert not tolerance(torch.float64).explains(first)


def test_certificate_finds_an_early_exit_and_other_settings() -> None:
    config = tiny_config()
    model = ReferenceModel(config, random_tensors(config), torch.float64)
    output = reference(_request(SLED(rate=6.0, scale=20), max_tokens=20))
    exits = (*output.exits[:3], 2, *output.exits[4:])
    (found,) = verify_trace(model, replace(output, exits=exits))
    assert (found.index, found.kind, found.found, found.expected) == (3, "exit", 2, 4)
    settings = resolve_contrast(SLED(rate=6.0, scale=20, variant="released"), config)
    assert verify_trace(model, replace(output, contrast=settings)) != []
    for contrast in (None, resolve_contrast(DoLa(), config)):
        with pytest.raises(RequestError, match="'sled' does not go with contrast"):
            verify_trace(model, replace(output, contrast=contrast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_explains_every_divergence_in_lower_precision(dtype: torch.dtype) -> None:
    config = tiny_config()
    tensors = random_tensors(config, dtype=dtype)
    requests = [
        _request(contrast, f"{number}{sampling.seed}", sampling=sampling, max_tokens=20)
        for number, contrast in enumerate(CONTRASTS)
        for sampling in (SamplingParams(), DRAWN)
    ]
    made, _ = serve(make_engine(config, dtype, tensors=tensors), requests)
    model = ReferenceModel(config, tensors, torch.float64)
    for output in made:
        for divergence in verify_trace(model, output):
            assert tolerance(dtype).explains(divergence), (output.contrast, divergence)


def test_margin_covers_sets_and_layers_that_rounding_changes() -> None:
    """Near the bound of DoLa's set, near another premature layer, and near SLED's scale."""
    config = tiny_config()
    model = ReferenceModel(config, random_tensors(config), torch.float64)
    (row,) = contrasted_logits(model, random_tokens(5), DoLa(), slice(4, 5))
    first, second, third = row.final.topk(3).indices.tolist()
    final = row.final.clone()
    final[third] = final[second] - 1e-7
    near = replace(row, final=final)
    arguments = (SamplingParams(), 4, third, (1,), ())
    assert 0.0 < contrast_margin(near, SLED(scale=2, rate=1e-6), *arguments) < 10.0
    final[second] = final[first] - 1e-7
    assert contrast_margin(near, SLED(scale=1), SamplingParams(), 4, second, (1,), ()) < 1e-6
    early = torch.stack([final, final])
    early[0, first] += 4.0  # log p - log q of `first` is low at layer 0, and high at layer 1
    early[1, first] -= 4.0
    tied = replace(row, final=final, early=early)
    for token in (first, second):
        bound = DoLa(layers=(1, 2), alpha=1e-9)
        assert contrast_margin(tied, bound, SamplingParams(), 4, token, (1,), ()) < 8.0


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_margin_covers_moves_of_the_weights_of_sled(variant: str) -> None:
    """If early layers are close to the final one, small errors change their direction."""
    generator = torch.Generator().manual_seed(0)
    contrast, error = SLED(scale=5, variant=variant, layers=(1, 2)), 1e-4
    num_other = 0
    for _ in range(100):
        final = torch.randn(16, generator=generator, dtype=torch.float64)
        final[0] = final[1] = 4.0
        early = final + 1e-4 * torch.randn(2, 16, generator=generator, dtype=torch.float64)
        noise = error * (torch.rand(3, 16, generator=generator, dtype=torch.float64) - 0.5)
        row = evolve(final[None], early[None], contrast)[0]
        other = evolve((final + noise[0])[None], (early + noise[1:])[None], contrast)[0]
        if (token := int(other.argmax())) != int(row.argmax()):
            num_other += 1
            arguments = (contrast, SamplingParams(), 4, token, (1,), ())
            margin = contrast_margin(ContrastedRow(row, final, early), *arguments)
            assert margin < 8 * error
    assert num_other > 10


@pytest.mark.parametrize(
    "contrast",
    [SLED(rate=0.5, scale=40), SLED(scale=40), DoLa(layers=1, alpha=1e-3)],
    ids=["sled, low rate", "sled", "dola"],
)
def test_margin_does_not_explain_a_token_that_is_lower_by_a_logit(contrast: Contrast) -> None:
    config = tiny_config()
    model = ReferenceModel(config, random_tensors(config), torch.float64)
    is_explained = tolerance(torch.bfloat16).explains
    num_tokens = 0
    for row in contrasted_logits(model, random_tokens(9), contrast, slice(8, 9)):
        lower = row.logits.max() - row.logits
        for token in ((lower > 1.5) & (lower < 500.0)).nonzero()[:, 0].tolist():
            num_tokens += 1
            arguments = (contrast, SamplingParams(), 4, token, (1,), ())
            margin = contrast_margin(row, *arguments)
            assert not is_explained(Divergence(0, "token", token, 0, margin)), lower[token]
    assert num_tokens > 10


def test_engine_wants_resolved_settings() -> None:
    request = replace(_request(DoLa()), contrast=DoLa())
    with pytest.raises(RequestError, match="Use resolve_contrast first"):
        make_engine().add(request)


@pytest.mark.parametrize(
    ("strategy", "contrast"),
    [("sled", None), ("dola", SLED()), ("exact", DoLa()), ("full", SLED())],
)
def test_request_needs_the_settings_of_its_strategy(
    strategy: str, contrast: Contrast | None
) -> None:
    with pytest.raises(RequestError, match="does not go with contrast"):
        replace(make_request(), strategy=strategy, contrast=contrast)
