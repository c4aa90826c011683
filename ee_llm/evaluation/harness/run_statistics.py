"""What happened to the requests of a run: the exits of their tokens, and truncated contexts."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger(__name__)


class RunStatistics:
    """Counts of a run, for each kind of request, such as "loglikelihood"."""

    def __init__(self) -> None:
        self._exits: dict[str, Counter[int]] = {}
        self._num_truncated: Counter[str] = Counter()

    def add_exits(self, kind: str, exits: Iterable[int]) -> None:
        """Count the exits that decided the tokens of a request."""
        self._exits.setdefault(kind, Counter()).update(exits)

    def add_truncated(self, kind: str, count: int, total: int, max_length: int) -> None:
        """Count requests whose contexts were cut, and warn if there are any.

        Args:
            kind: The kind of request.
            count: Number of these requests in a call.
            total: Number of all requests in the call.
            max_length: Maximum number of tokens that the model sees.
        """
        if count == 0:
            return
        self._num_truncated[kind] += count
        logger.warning(
            "%d of %d %s requests do not fit into max_length = %d tokens, so their contexts are cut"
            " on the left.",
            count,
            total,
            kind,
            max_length,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as values that JSON can represent."""
        return {
            "exits": {kind: _depth(counts) for kind, counts in self._exits.items() if counts},
            "num_truncated": dict(self._num_truncated),
        }


def _depth(counts: Counter[int]) -> dict[str, Any]:
    """Return the number of tokens, their mean depth and the share of each exit."""
    total = counts.total()
    return {
        "num_tokens": total,
        "mean_depth": sum(exit * count for exit, count in counts.items()) / total,
        "share_by_exit": {str(exit): count / total for exit, count in sorted(counts.items())},
    }
