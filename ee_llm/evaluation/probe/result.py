"""The result of a probe: metrics of every boundary, and the exits to add."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ee_llm.evaluation.probe.options import enough_tokens
from ee_llm.evaluation.probe.plot import save_probe_plot
from ee_llm.evaluation.probe.recommend import Recommendation
from ee_llm.evaluation.probe.report import report

LITTLE = 0.05
"""Saving below which a model has little to skip."""

MIN_DRAWN = 50
"""Number of tokens from which a class is drawn in the picture."""


@dataclass(frozen=True)
class BoundaryMetrics:
    """What an exit after a layer would predict, with a least-squares fit and without.

    Margins are estimated from blocks of up to 128 neighbouring positions. They are None for a text
    with fewer than 8 blocks.

    Attributes:
        boundary: Number of layers before the exit.
        agreement: Share of positions where the most probable token of the least-squares exit is
            that of the final exit.
        agreement_margin: Half the width of the 95 % confidence interval of `agreement`.
        bare_agreement: The same for the final norm and output weight on the residual stream.
        loss: Mean negative log probability of the next token, in nats.
        loss_margin: Half the width of the 95 % confidence interval of `loss`.
        confidence: Mean probability of the most probable token.
        confident_share: Share of positions whose confidence is 0.8 or more.
        confident_agreement: Agreement at these positions, None if there are none.
    """

    boundary: int
    agreement: float
    agreement_margin: float | None
    bare_agreement: float
    loss: float
    loss_margin: float | None
    confidence: float
    confident_share: float
    confident_agreement: float | None


@dataclass(frozen=True)
class ClassMetrics:
    """The agreement at the positions whose next token is of one class.

    Attributes:
        name: The class: word start, word continuation, number, punctuation, whitespace or other.
        num_tokens: Number of positions.
        agreement: Agreement of the least-squares exit at each boundary.
    """

    name: str
    num_tokens: int
    agreement: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class ProbeResult:
    """What exits at every boundary would do; `repr` returns it as tables.

    Attributes:
        checkpoint: Directory of the checkpoint.
        inputs: Prefixes of prepared data, or text files, of the test.
        fit_inputs: The same for the least-squares fit.
        is_prepared: Whether `fit_inputs` are prefixes of prepared data.
        num_tokens: Number of tokens of the test.
        num_fit_tokens: Number of tokens of the fit.
        seq_length: Length of a window in tokens.
        dtype: Name of the dtype of the computation.
        num_layers: Number of layers of the model.
        hidden_size: Size of its residual stream.
        existing_exits: Boundaries of its early exits, which the probe ignores.
        final_loss: Loss of the final exit, in nats.
        risk: Share of tokens whose exit may disagree with the final exit.
        head_cost: Cost of an exit's head, in layers.
        layer_seconds: Measured time of a layer for one token, None if it was not measured.
        head_seconds: Measured time of an exit's head for one token, None if it was not measured.
        boundaries: The metrics of each boundary, in order of depth.
        classes: The agreement by class of the next token, for classes that occur.
        recommendations: The best exits for 1, 2, ... of them.
    """

    checkpoint: str
    inputs: tuple[str, ...]
    fit_inputs: tuple[str, ...]
    is_prepared: bool
    num_tokens: int
    num_fit_tokens: int
    seq_length: int
    dtype: str
    num_layers: int
    hidden_size: int
    existing_exits: tuple[int, ...]
    final_loss: float
    risk: float
    head_cost: float
    layer_seconds: float | None
    head_seconds: float | None
    boundaries: tuple[BoundaryMetrics, ...]
    classes: tuple[ClassMetrics, ...]
    recommendations: tuple[Recommendation, ...]

    @property
    def best(self) -> Recommendation:
        """The recommendation that saves most."""
        return self.recommendations[-1]

    @property
    def num_needed_layers(self) -> int:
        """Number of layers without the last ones that change no prediction of the test."""
        needed = self.num_layers
        for metrics in reversed(self.boundaries):
            if metrics.bare_agreement < 1:
                break
            needed = metrics.boundary
        return needed

    @property
    def findings(self) -> list[str]:
        """Sentences about the model that a reader should not miss."""
        found = []
        if (needed := self.num_needed_layers) < self.num_layers:
            found.append(
                f"Layers {needed + 1} to {self.num_layers} change no prediction: for all"
                f" {self.num_tokens:,} tokens, the final exit's head gives the same most probable"
                f" token after layer {needed}."
            )
        if self.best.saving < LITTLE:
            most = f"exits save at most {self.best.saving:.1%} of the cost of a token"
            if not self.best.exits:
                most = "no exit saves anything"
            found.append(
                f"This model has little to skip: {most} if at most {100 * self.risk:.6g}% of the"
                f" tokens may differ and a head costs {self.head_cost:.1f} layers."
            )
        if self.num_fit_tokens < (enough := enough_tokens(self.hidden_size)):
            found.append(
                f"{self.num_fit_tokens:,} tokens are few for the fit with hidden_size ="
                f" {self.hidden_size}. Use {enough:,} or more: the agreement will be higher."
            )
        return found

    @property
    def next_commands(self) -> list[str]:
        """The commands that add the exits that save most; none if no exit saves anything."""
        if not self.best.exits:
            return []
        commands, source, place = [], self.checkpoint, "runs/with-exits"
        if self.existing_exits:
            listed = " ".join(map(str, self.existing_exits))
            commands.append(
                f"ee-llm checkpoint remove-exits {shlex.quote(source)} --exits {listed} --output"
                " runs/backbone"
            )
            source = "runs/backbone"
        exits = " ".join(map(str, self.best.exits))
        data = shlex.join(self.fit_inputs) if self.is_prepared else "PREFIX"
        commands.append(
            f"ee-llm checkpoint add-exits {shlex.quote(source)} --exits {exits} --initialization"
            f" least-squares --data {data} --num-tokens {self.num_fit_tokens} --seq-length"
            f" {self.seq_length} --output {place}"
        )
        return commands

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes, `num_needed_layers`, `findings` and `next_commands` for JSON."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for name in _DERIVED:
            values[name] = getattr(self, name)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProbeResult":
        """Return the result that `to_dict` turned into these values."""
        found = {name: value for name, value in values.items() if name not in _DERIVED}
        found |= {name: tuple(values[name]) for name in ("inputs", "fit_inputs", "existing_exits")}
        found["boundaries"] = tuple(BoundaryMetrics(**one) for one in values["boundaries"])
        found["classes"] = tuple(
            ClassMetrics(**{**one, "agreement": tuple(one["agreement"])})
            for one in values["classes"]
        )
        lists = ("exits", "thresholds")
        found["recommendations"] = tuple(
            Recommendation(**{**one, **{name: tuple(one[name]) for name in lists}})
            for one in values["recommendations"]
        )
        return cls(**found)

    def save_plot(self, path: str | Path) -> None:
        """Draw the agreement by boundary and by class of token, with the recommended exits.

        Args:
            path: File to write, .png or .svg.

        Raises:
            RequestError: The file has another suffix.
        """
        metrics = self.boundaries
        save_probe_plot(
            Path(path),
            f"{self.num_tokens:,} tokens, {self.num_layers} layers",
            [one.boundary for one in metrics],
            [(one.agreement, one.agreement_margin or 0.0) for one in metrics],
            [one.bare_agreement for one in metrics],
            {
                f"{one.name} ({one.num_tokens:,})": one.agreement
                for one in self.classes
                if one.num_tokens >= MIN_DRAWN
            },
            self.best.exits,
        )

    def __repr__(self) -> str:
        return report(self.to_dict())


_DERIVED = ("num_needed_layers", "findings", "next_commands")
