"""Record what every exit of a checkpoint does on a text, for benchmarks of calibrations."""

from typing import Any

from ee_llm.evaluation.calibration.collector import Calibration
from ee_llm.evaluation.calibration.options import CalibrateOptions
from ee_llm.evaluation.text_pass import run_pass


def collect_exits(options: CalibrateOptions, skipped: int = 0) -> Calibration:
    """Return the collector of a calibration after its pass, with its records and costs.

    skipped: number of tokens at the start of the text that are not used.
    """
    found: list[Calibration] = []

    def make(config: Any) -> Calibration:
        found.append(Calibration(config, options))
        return found[0]

    run_pass(options, f"measuring {options.measure}", make, options.measure, skipped)
    return found[0]
