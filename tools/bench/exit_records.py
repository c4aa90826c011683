"""Record what every exit of a checkpoint does on a text, for benchmarks of calibrations."""

from collections.abc import Callable
from typing import Any

from ee_llm.data.windows import CountedWindows
from ee_llm.evaluation.calibration.collector import Calibration
from ee_llm.evaluation.calibration.options import CalibrateOptions
from ee_llm.evaluation.text_pass import run_pass


def collect_exits(
    options: CalibrateOptions,
    skipped: int = 0,
    make_windows: Callable[..., CountedWindows] | None = None,
) -> Calibration:
    """Return the collector of a calibration after its pass, with its records and costs.

    Args:
        options: The checkpoint, the text, the measure, and how to compute.
        skipped: Number of tokens at the start of the text that are not used.
        make_windows: Returns windows to use instead of the text of the options.
    """
    found: list[Calibration] = []

    def make(config: Any) -> Calibration:
        found.append(Calibration(config, options))
        return found[0]

    title = f"measuring {options.measure}"
    run_pass(options, title, make, options.measure, skipped, make_windows=make_windows)
    return found[0]
