"""The heads of exits: from hidden states to logits, and to confidences that need no logits.

Legend of shapes: t rows, r rows with logits, q queries, h hidden, v vocabulary, k candidates, n
tensor-parallel ranks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm.architecture.gates import Gate, gated_boundaries
from ee_llm.config import Config
from ee_llm.inference.choices import HiddenMeasure
from ee_llm.inference.execution.layers import Layer, Mlp, Norm, Shard, Translator
from ee_llm.inference.execution.linear import Linear
from ee_llm.inference.execution.quantization import Int8Linear
from ee_llm.inference.exits.confidence import saturation, shortlist
from ee_llm.inference.scheduling.output import HiddenQuery


class HiddenRows(NamedTuple):
    """Rows at the end of a layer range.

    Attributes:
        x: Residual stream [t, h] after the last layer.
        attended: Residual stream [t, h] before the MLP of the last layer.
        before: Residual stream [t, h] before the last layer.
    """

    x: Tensor
    attended: Tensor
    before: Tensor

    def select(self, numbers: Tensor) -> "HiddenRows":
        """Return the rows with these numbers [r]."""
        return HiddenRows(*(part[numbers] for part in self))


class Projection:
    """The output projection of an exit, divided by the exit's temperature."""

    def __init__(self, output: Linear | Int8Linear, temperature: float) -> None:
        self._output = output
        self._temperature = temperature

    def __call__(self, features: Tensor) -> Tensor:
        """Return this rank's logits [r, v / n] for the input [r, h] of the output projection."""
        return self._tempered(self._output(features))

    def candidate_logits(
        self, features: Tensor, ids: Tensor, shard: Shard, first_id: int
    ) -> Tensor:
        """Return the logits [r, k] of a few token ids [r, k] per row, on every rank.

        Args:
            features: Input [r, h] of the output projection.
            ids: Token ids of the whole vocabulary.
            shard: This rank's share of the model.
            first_id: First token id of this rank.
        """
        index = ids - first_id
        is_here = (index >= 0) & (index < self._output.num_outputs)
        rows = self._output.rows(index.where(is_here, torch.zeros_like(index)))
        logits = (rows @ features[:, :, None])[:, :, 0].masked_fill(~is_here, 0.0)
        return self._tempered(shard.reduce(logits))

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self._temperature == 1.0 else logits / self._temperature


class Head:
    """An exit: [block] -> [mlp] -> [translator] -> [norm] -> output projection.

    The final exit has only a norm.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        boundary: int,
        projection: Projection,
        shard: Shard,
    ) -> None:
        model, exits = config.model, config.exits
        is_final = boundary == model.num_layers
        parts = ("norm",) if is_final else exits.head
        name = f"exits.{boundary}"
        self.block = Layer(model, tensors, f"{name}.block", shard) if "block" in parts else None
        self._mlp = None
        if "mlp" in parts:
            self._mlp = Mlp(model, tensors, f"{name}.mlp", f"{name}.mlp_norm", shard)
        self._translator = None
        if "translator" in parts:
            self._translator = Translator(model, tensors, f"{name}.translator", shard)
        self._norm = Norm(model, tensors, f"{name}.norm") if "norm" in parts else None
        self._projection = projection
        self._shard = shard
        self._gate = None
        if not is_final and boundary in gated_boundaries(tensors):
            self._gate = Gate(tensors, boundary, model.norm_eps)

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return this rank's logits [r, v / n].

        Args:
            x: Rows [r, h] after the layer, or after the exit's block if it has one.
            attended: The same rows [r, h] before the MLP of that layer or block. Without a block,
                the exit's `mlp` takes the place of the layer's own (EE-Tuning, arXiv 2402.00518).
        """
        return self._projection(self.features(x, attended))

    def confidences(
        self,
        hidden: HiddenRows,
        head_input: tuple[Tensor, Tensor],
        queries: Sequence[HiddenQuery],
        first_id: int,
    ) -> Tensor:
        """Return the confidence [q] of rows, float64, without computing all logits.

        Args:
            hidden: The rows at the exit's boundary.
            head_input: The arguments of a call for these rows.
            queries: The query of each row.
            first_id: First token id of this rank.
        """
        found = torch.empty(len(queries), dtype=torch.float64, device=hidden.x.device)
        for measure in dict.fromkeys(query.measure for query in queries):
            numbers = [n for n, query in enumerate(queries) if query.measure == measure]
            here = torch.tensor(numbers, device=found.device)
            if measure == "gate" or measure == "saturation":
                values = self.hidden_confidences(hidden.select(here), measure)
            else:
                assert measure == "shortlist", f"{measure} needs all logits"
                ids = torch.tensor([queries[n].predicted for n in numbers], device=found.device)
                features = self.features(*(part[here] for part in head_input))
                values = shortlist(
                    self._projection.candidate_logits(features, ids, self._shard, first_id)
                )
            found[here] = values.double()
        return found

    def hidden_confidences(self, hidden: HiddenRows, measure: HiddenMeasure) -> Tensor:
        """Return the confidence [r] of rows by a measure of hidden states."""
        if measure == "saturation":
            return saturation(hidden.x, hidden.before)
        assert self._gate is not None, "callers check that the exit has a gate"
        return self._gate(hidden.x)

    def early(self, x: Tensor, has_norm: bool) -> Tensor:
        """Return this rank's logits [r, v / n] of rows [r, h] at any boundary."""
        return self._projection(self._norm(x) if has_norm and self._norm is not None else x)

    def features(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the input [r, h] of the output projection; the arguments are those of a call."""
        x = self.trunk(x, attended)
        if self._translator is not None:
            x = self._translator(x)
        return x if self._norm is None else self._norm(x)

    def trunk(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the input [r, h] of the translator; the arguments are those of a call."""
        if self._mlp is None:
            return x
        start = attended if self.block is None else x
        return start + self._mlp(start)
