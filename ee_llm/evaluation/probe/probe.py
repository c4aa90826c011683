"""Find the boundaries of a checkpoint's model where exits belong."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import TextColumn
from torch import Tensor

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.errors import RequestError
from ee_llm.evaluation.averages import Average
from ee_llm.evaluation.calibration.records import Records
from ee_llm.evaluation.calibration.search import Costs
from ee_llm.evaluation.probe.backbone import Backbone
from ee_llm.evaluation.probe.costs import measure_latency, weight_ratios
from ee_llm.evaluation.probe.measure import Measured, OnTokens, fit, measure
from ee_llm.evaluation.probe.options import ProbeOptions, budget, check_probe, probed_boundaries
from ee_llm.evaluation.probe.recommend import recommend
from ee_llm.evaluation.probe.result import BoundaryMetrics, ClassMetrics, ProbeResult
from ee_llm.evaluation.probe.texts import Texts, read_texts
from ee_llm.evaluation.probe.token_classes import CLASSES, token_classes
from ee_llm.evaluation.text_pass import window_length

CONFIDENT = 0.8
"""Confidence from which a position counts in `confident_share`."""


def probe(options: ProbeOptions) -> ProbeResult:
    """Return what exits at every boundary would predict, and which of them to add.

    One process computes everything.

    Args:
        options: The options.

    Raises:
        UserError: The options, the text or the checkpoint is not valid, or the text is too short.
        RunError: The hidden states at a boundary, or the loss of an exit, are not finite.
    """
    check_probe(options)
    if distributed.launched_world_size() not in (None, 1):
        raise RequestError(
            f"WORLD_SIZE = {distributed.launched_world_size()} in the environment, but a probe is"
            " a single process. Start it without a launcher."
        )
    reader = TensorReader(options.checkpoint)
    config = reader.config()
    model = config.model
    boundaries = probed_boundaries(options, model.num_layers)
    num_exits = budget(options, len(boundaries))
    seq_length = window_length(options, config)
    tokenizer = load_tokenizer(reader.tokenizer(), config.data.eos_token)
    texts = read_texts(options, tokenizer, seq_length, model.hidden_size)
    dtype, measured = _run(options, reader, config, boundaries, tokenizer, texts, seq_length)
    latency = measure_latency(reader) if options.costs == "measured" else None
    if latency is None:
        head, final_head = weight_ratios(config)
    else:
        head, final_head = latency.head / latency.layer, latency.final_head / latency.layer
    costs = Costs(boundaries, model.num_layers, head, final_head=final_head)
    # The risk is a share of tokens, so each token is a window.
    each = torch.arange(len(measured.tokens))
    records = Records(boundaries, measured.confidence, 1 - measured.agrees.float(), each)
    with _bar(options, "choosing exits", num_exits) as advance:
        recommendations = recommend(records, costs, options.risk, num_exits, lambda: advance(1))
    inputs = options.data or tuple(map(str, options.text))
    return ProbeResult(
        checkpoint=str(reader.path),
        inputs=inputs,
        fit_inputs=options.fit_data or inputs,
        is_prepared=bool(options.fit_data or options.data),
        num_tokens=len(measured.tokens),
        num_fit_tokens=texts.num_fit_tokens,
        seq_length=seq_length,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        existing_exits=config.exits.boundaries,
        final_loss=float(measured.final_losses.mean()),
        risk=options.risk,
        head_cost=head,
        layer_seconds=None if latency is None else latency.layer,
        head_seconds=None if latency is None else latency.head,
        boundaries=tuple(_boundary(measured, index) for index in range(len(measured.boundaries))),
        classes=_classes(measured, tokenizer),
        recommendations=recommendations,
    )


def _run(
    options: ProbeOptions,
    reader: TensorReader,
    config: Config,
    boundaries: tuple[int, ...],
    tokenizer: Tokenizer,
    texts: Texts,
    seq_length: int,
) -> tuple[torch.dtype, Measured]:
    """Return the dtype of the computation, and what the fitted exits predict."""
    model = config.model
    backbone = Backbone(reader, boundaries, seq_length)
    with _bar(options, "fitting exits", texts.num_fit_tokens) as advance:
        translators = fit(
            backbone,
            boundaries,
            texts.fit,
            model.vocab_size,
            model.hidden_size,
            model.norm_eps,
            advance,
        )
    eos_token_id = tokenizer.eos_token_id if config.data.mask_after_eos else None
    with _bar(options, "testing exits", texts.num_test_tokens) as advance:
        measured = measure(
            backbone,
            translators,
            texts.test,
            model.vocab_size,
            model.norm_eps,
            eos_token_id,
            advance,
        )
    return backbone.model.dtype, measured


@contextmanager
def _bar(options: ProbeOptions, title: str, total: int) -> Iterator[OnTokens]:
    """Show a progress bar, and yield a function that takes the amount of work done."""
    share = TextColumn("{task.percentage:.0f} %")
    is_quiet = not options.progress
    with distributed.progress_bar(title, total, share, is_quiet=is_quiet) as bar:
        (task,) = bar.task_ids
        yield lambda amount: bar.update(task, advance=amount)


def _boundary(measured: Measured, index: int) -> BoundaryMetrics:
    agrees, confidence = measured.agrees[index].double(), measured.confidence[index]
    estimates = []
    for values in (agrees, measured.losses[index]):
        average = Average()
        average.add(values)
        estimates.append(average.estimate())
    agreement, loss = estimates
    is_confident = confidence >= CONFIDENT
    return BoundaryMetrics(
        measured.boundaries[index],
        agreement.value,
        agreement.margin,
        _mean(measured.bare_agrees[index]),
        loss.value,
        loss.margin,
        _mean(confidence),
        _mean(is_confident),
        _mean(agrees[is_confident]) if is_confident.any() else None,
    )


def _classes(measured: Measured, tokenizer: Tokenizer) -> tuple[ClassMetrics, ...]:
    classes = token_classes(tokenizer, measured.previous, measured.tokens)
    found: list[Any] = []
    for number, name in enumerate(CLASSES):
        is_here = classes == number
        if is_here.any():
            shares = (_mean(agrees[is_here]) for agrees in measured.agrees)
            found.append(ClassMetrics(name, int(is_here.sum()), tuple(shares)))
    return tuple(found)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
