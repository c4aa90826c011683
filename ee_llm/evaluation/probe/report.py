"""A probe's result as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from ee_llm.evaluation.options import shown_inputs
from ee_llm.evaluation.result import aligned

_Rows = list[tuple[str, ...]]


def report(values: Mapping[str, Any]) -> str:
    """Return the tables of a result.

    Args:
        values: The result, from `ProbeResult.to_dict`.
    """
    layers, boundaries = values["num_layers"], values["boundaries"]
    has_margins = any(one["agreement_margin"] is not None for one in boundaries)
    note = "; ± is half of the 95 % confidence interval" if has_margins else ""
    lines = [
        f"{values['checkpoint']}: {values['num_tokens']:,} tokens of"
        f" {shown_inputs(values['inputs'])}",
        f"least-squares exits from {values['num_fit_tokens']:,} tokens of"
        f" {shown_inputs(values['fit_inputs'])}",
        f"windows of {values['seq_length']:,} tokens, {values['dtype']}, loss in nats per token"
        f" (final exit: {values['final_loss']:.4f}){note}",
        "",
        *aligned(_boundary_rows(boundaries)),
        "",
        "agreement by class of the next token:",
        *aligned(_class_rows(boundaries, values["classes"])),
        "",
        f"best exits if at most {100 * values['risk']:.6g}% of the tokens may differ (an estimate,"
        " without a guarantee):",
        *aligned(_recommendation_rows(values["recommendations"], layers)),
        _cost_line(values),
    ]
    for finding in values["findings"]:
        lines += ["", finding]
    if values["next_commands"]:
        lines += ["", "next:", *(f"  {command}" for command in values["next_commands"])]
    return "\n".join(lines)


def _boundary_rows(boundaries: Sequence[Mapping[str, Any]]) -> _Rows:
    rows: _Rows = [
        ("exit after", "agreement", "bare", "loss", "confidence", ">= 0.8", "right if >= 0.8")
    ]
    for one in boundaries:
        rows.append(
            (
                f"layer {one['boundary']}",
                f"{_with_margin(one['agreement'], one['agreement_margin'], 1, 100)} %",
                f"{one['bare_agreement']:.1%}",
                _with_margin(one["loss"], one["loss_margin"], 3),
                f"{one['confidence']:.3f}",
                f"{one['confident_share']:.1%}",
                _share(one["confident_agreement"]),
            )
        )
    return rows


def _class_rows(
    boundaries: Sequence[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]]
) -> _Rows:
    rows: _Rows = [("exit after", *(one["name"] for one in classes))]
    rows.append(("tokens", *(f"{one['num_tokens']:,}" for one in classes)))
    for index, one in enumerate(boundaries):
        shares = (f"{column['agreement'][index]:.1%}" for column in classes)
        rows.append((f"layer {one['boundary']}", *shares))
    return rows


def _recommendation_rows(recommendations: Sequence[Mapping[str, Any]], num_layers: int) -> _Rows:
    rows: _Rows = [
        ("exits", "after layers", "thresholds", "saving", "mean depth", "at the final exit")
    ]
    for one in recommendations:
        rows.append(
            (
                str(one["num_exits"]),
                " ".join(map(str, one["exits"])) or "none",
                " ".join(f"{threshold:.3f}" for threshold in one["thresholds"]) or "-",
                f"{one['saving']:.1%}",
                f"{one['mean_depth']:.2f} of {num_layers}",
                f"{one['final_share']:.1%}",
            )
        )
    return rows


def _cost_line(values: Mapping[str, Any]) -> str:
    cost = f"a head costs {values['head_cost']:.2f} layers"
    if values["layer_seconds"] is None:
        return f"{cost}: the ratio of their weights"
    layer, head = (1e3 * values[name] for name in ("layer_seconds", "head_seconds"))
    return f"{cost}: {head:.3f} ms and {layer:.3f} ms per token on this machine"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _with_margin(value: float, margin: float | None, digits: int, scale: float = 1) -> str:
    text = f"{scale * value:.{digits}f}"
    return text if margin is None else f"{text} ± {scale * margin:.{digits}f}"
