"""`ee_llm.probe`: the function of the Python API."""

from collections.abc import Sequence
from pathlib import Path

from ee_llm.evaluation.options import listed
from ee_llm.evaluation.probe.options import CostSource, ProbeOptions
from ee_llm.evaluation.probe.result import ProbeResult


def probe(
    checkpoint: str | Path,
    *,
    data: Sequence[str | Path] | str | Path = (),
    text: Sequence[str | Path] | str | Path = (),
    fit_data: Sequence[str | Path] | str | Path = (),
    num_tokens: int | None = None,
    num_fit_tokens: int | None = None,
    seq_length: int | None = None,
    boundaries: Sequence[int] | int = (),
    num_exits: int | None = None,
    risk: float = 0.05,
    costs: CostSource = "measured",
    progress: bool = True,
) -> ProbeResult:
    """Find the layers after which exits belong.

    Exits are fitted by least squares to one part of the text, after every layer, and tested on
    another part. The savings are estimates for the thresholds that are best on the tested part;
    `calibrate` gives a guarantee. One process computes everything, in float32 (float64 for a
    float64 checkpoint). The exits of the checkpoint are ignored.

    Args:
        checkpoint: Checkpoint directory, or run directory, whose newest checkpoint is used.
        data: Prefixes of token files that `ee-llm data prepare` wrote.
        text: Files or folders of plain text, JSON or Parquet, instead of `data`.
        fit_data: Prefixes of token files for the fit. Empty means the first part of the text.
        num_tokens: Number of tokens to test. None means 10,000.
        num_fit_tokens: Number of tokens of the fit, rounded up to whole windows. None means 20 per
            unit of hidden_size, but at most half of a short text.
        seq_length: Length of a window in tokens. None means the checkpoint's data.seq_length, at
            most 2048.
        boundaries: Numbers of layers after which to probe. Empty means all but the last.
        num_exits: Greatest number of exits to recommend. None means 3.
        risk: Share of tokens whose exit may disagree with the final exit about the most probable
            token.
        costs: Cost of an exit's head against that of a layer: "measured" on this machine, or the
            ratio of their "weights".
        progress: Show progress bars in terminals.

    Raises:
        UserError: An argument, the text or the checkpoint is not valid, or the text is too short.
        RunError: The hidden states or the loss of an exit are not finite.
    """
    from ee_llm.evaluation.probe.probe import probe as _probe

    options = ProbeOptions(
        Path(checkpoint),
        data=tuple(map(str, listed(data))),
        text=tuple(map(Path, listed(text))),
        num_tokens=num_tokens,
        seq_length=seq_length,
        fit_data=tuple(map(str, listed(fit_data))),
        num_fit_tokens=num_fit_tokens,
        boundaries=tuple(listed(boundaries)),
        num_exits=num_exits,
        risk=risk,
        costs=costs,
        progress=progress,
    )
    return _probe(options)
