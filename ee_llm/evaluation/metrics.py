"""The average metrics of every exit over all windows."""

from typing import Any

from torch import Tensor

from ee_llm.evaluation.averages import Average
from ee_llm.evaluation.measure import COLUMNS

_AVERAGED = ("loss", "agreement", "kl_to_final", "confidence")


class Metrics:
    """Collects the metrics of `ee-llm evaluate`; see `measure.Collector`."""

    def __init__(self) -> None:
        self._averages: dict[int, dict[str, Average]] = {}

    def add(self, columns: dict[int, Tensor]) -> None:
        for boundary, found in columns.items():
            averages = self._averages.setdefault(boundary, {name: Average() for name in _AVERAGED})
            for name in _AVERAGED:
                averages[name].add(found[COLUMNS.index(name)])

    def check(self, num_windows: int) -> None:
        pass  # One window is enough.

    def result(self) -> list[dict[str, Any]]:
        last = max(self._averages)
        return [_metrics(b, b == last, averages) for b, averages in self._averages.items()]


def _metrics(boundary: int, is_final: bool, columns: dict[str, Average]) -> dict[str, Any]:
    estimates = {name: average.estimate() for name, average in columns.items()}
    found: dict[str, Any] = {"boundary": boundary, "is_final": is_final}
    for name, estimate in estimates.items():
        found[name] = estimate.value
        if name in ("loss", "agreement"):
            found |= {f"{name}_error": estimate.error, f"{name}_margin": estimate.margin}
    return found
