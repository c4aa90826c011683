"""A report as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from collections.abc import Iterable, Sequence
from html import escape

from ee_llm.evaluation.options import shown_inputs
from ee_llm.evaluation.reliability import calibration_error
from ee_llm.evaluation.report.advice import advise
from ee_llm.evaluation.report.charts import front_svg, reliability_svg
from ee_llm.evaluation.report.content import ReportContent
from ee_llm.evaluation.report.style import STYLE
from ee_llm.evaluation.sweep.result import SweepResult
from ee_llm.inference.text.html import colored_html


def page_of(content: ReportContent) -> str:
    """Return the HTML of a report."""
    title = f"Exits of {content.options.checkpoint}"
    sections = [
        _section("What to set", _advice(content)),
        _section("Model", _model(content)),
        _section("Exits", _metrics(content)),
        _section("Confidence", _reliability(content)),
        _section("Speed and agreement", _front(content.sweep)),
        _section("Depth", _depth(content)),
        _section("Samples", _samples(content)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(sections)}"
        f"<footer>Written by ee-llm report.</footer>\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def _table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row and column are headers. Cells are plain text."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[1:]
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n"
        "</tbody></table></div>\n"
    )


def _advice(content: ReportContent) -> str:
    parts = []
    for one in advise(content):
        parts.append(_paragraph(one.text))
        if one.command:
            parts.append(f'<pre tabindex="0"><code>{escape(one.command)}</code></pre>\n')
    return "".join(parts)


def _model(content: ReportContent) -> str:
    model, exits = content.config.model, content.config.exits
    facts = {
        "checkpoint": content.evaluation.checkpoint,
        "fingerprint": content.fingerprint,
        "family": model.family,
        "layers": str(model.num_layers),
        "hidden size": f"{model.hidden_size:,}",
        "vocabulary": f"{model.vocab_size:,}",
        "early exits after layers": ", ".join(map(str, exits.boundaries)),
        "parts of a head": ", ".join(exits.head) or "none",
        "output weight of the exits": exits.output,
    }
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in facts.items()
    )
    return f"<dl>\n{rows}</dl>\n"


def _metrics(content: ReportContent) -> str:
    result = content.evaluation
    rows = [["exit", "loss", "perplexity", "agreement", "KL to final", "confidence", "ECE"]]
    for one in result.exits:
        error = calibration_error(content.reliability.get(one.boundary, ()))
        rows.append(
            [
                f"layer {one.boundary}" + (" (final)" if one.is_final else ""),
                f"{one.loss:.4f}",
                f"{one.perplexity:.4g}",
                f"{one.agreement:.1%}" + _margin(one.agreement_margin),
                f"{one.kl_to_final:.4f}",
                f"{one.confidence:.3f}",
                "" if error is None else f"{error:.3f}",
            ]
        )
    caption = (
        f"{result.num_tokens:,} tokens of {shown_inputs(result.inputs)}, windows of"
        f" {result.seq_length:,} tokens, {result.dtype}"
    )
    note = (
        "Agreement is the share of tokens where the exit's most probable token is that of the final"
        " exit, with half of its 95 % confidence interval. The loss is in nats per token. ECE, the"
        " expected calibration error, is how far confidence and agreement lie apart on average."
    )
    return _table(caption, rows) + _paragraph(note)


def _margin(margin: float | None) -> str:
    return "" if margin is None else f" ± {100 * margin:.1f}"


def _reliability(content: ReportContent) -> str:
    rows = [["exit and confidence", "tokens", "agreement"]]
    for boundary, bins in content.reliability.items():
        for one in bins:
            name = f"exit {boundary}, {one.confidence:.3f}"
            rows.append([name, f"{one.num_tokens:,}", f"{one.agreement:.1%}"])
    errors = ", ".join(
        f"exit {boundary} {calibration_error(bins):.3f}"
        for boundary, bins in content.reliability.items()
    )
    label = f"Reliability diagrams. Expected calibration errors: {errors}."
    return (
        _paragraph(
            "An exit whose confidence can be taken literally lies on the dotted line. Below it, the"
            " exit is overconfident. Larger points have more tokens."
        )
        + f"<figure>\n{reliability_svg(content.reliability, label)}\n</figure>\n"
        + _details("The numbers", _table("Confidence and agreement by bin", rows))
    )


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"


def _front(sweep: SweepResult | None) -> str:
    if sweep is None:
        return ""
    best, front = sweep.recommended, sweep.front
    rows = [["point", "speed-up", "quartiles", "ideal", "agreement", "95 % interval", "layers"]]
    for one in sweep.points:
        marks = [
            word for word, is_so in (("front", one in front), ("recommended", one is best)) if is_so
        ]
        rows.append(
            [
                one.name + (f" ({', '.join(marks)})" if marks else ""),
                "not timed" if one.speedup is None else f"{one.speedup:.2f}",
                _range(one.speedup_low, one.speedup_high, ".2f"),
                f"{one.ideal_speedup:.2f}",
                f"{one.agreement:.2%}",
                _range(one.agreement_low, one.agreement_high, ".1%"),
                f"{one.layers:.2f}",
            ]
        )
    label = (
        f"Agreement over speed-up of {len(sweep.points)} points. Recommended: {best.name}, speed-up"
        f" {best.tested_speedup or 1.0:.2f}, agreement {best.agreement:.2%}."
    )
    caption = (
        f"{sweep.num_prompts} prompts of {shown_inputs(sweep.inputs)}, up to"
        f" {sweep.max_tokens} tokens each, batches of {sweep.batch_size}, {sweep.dtype}"
    )
    return (
        f"<figure>\n{front_svg(sweep.marks(), sweep.min_agreement, label)}\n</figure>\n"
        + _details("The numbers", _table(caption, rows))
    )


def _range(low: float | None, high: float | None, style: str) -> str:
    return "-" if low is None or high is None else f"{low:{style}} to {high:{style}}"


def _depth(content: ReportContent) -> str:
    ends = (*content.config.exits.boundaries, content.config.model.num_layers)
    columns: dict[str, Sequence[float]] = {}
    if content.calibration is not None and content.calibration.result is not None:
        columns["text of the calibration"] = content.calibration.result.shares
    if content.sweep is not None and any(content.sweep.recommended.thresholds):
        columns["generations of the sweep"] = content.sweep.recommended.shares
    exits = [exit for sample in content.samples for exit in sample.exits]
    if exits:
        columns[f"samples below ({len(exits):,} tokens)"] = [
            exits.count(end) / len(exits) for end in ends
        ]
    parts = [_bars(name, ends, shares) for name, shares in columns.items()]
    return "".join(parts)


def _bars(name: str, ends: Sequence[int], shares: Iterable[float]) -> str:
    """Return a histogram: a table whose cells have bars."""
    rows = "".join(
        f'<tr><th scope="row">layer {end}{" (final)" if end == ends[-1] else ""}</th>'
        f'<td class="bar"><span style="width:{100 * share:.1f}%"></span></td>'
        f"<td>{share:.1%}</td></tr>\n"
        for end, share in zip(ends, shares, strict=True)
    )
    return (
        f'<table class="bars"><caption>Share of tokens by exit: {escape(name)}</caption>\n'
        f"<tbody>\n{rows}</tbody></table>\n"
    )


def _samples(content: ReportContent) -> str:
    if not content.samples:
        return ""
    decoding = content.decoding
    policy = decoding.policy
    thresholds = ", ".join(
        f"exit {boundary} {'off' if threshold is None else format(threshold, '.4g')}"
        for boundary, threshold in zip(policy.boundaries, policy.thresholds, strict=True)
    )
    text = (
        f"Greedy generations with {decoding.source} (strategy {decoding.strategy},"
        f" {policy.measure}: {thresholds}). The prompt is grey, and the color of a token shows its"
        " exit."
    )
    shown = (
        colored_html(sample.prompt or "", sample.tokens, policy.boundaries, sample.num_layers)
        for sample in content.samples
    )
    return _paragraph(text) + "".join(f'<div class="sample">{one}</div>\n' for one in shown)
