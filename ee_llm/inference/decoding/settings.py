"""Settings of the strategies `sled` and `dola`, which contrast the final logits with early ones.

This module imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ee_llm.errors import RequestError
from ee_llm.inference.sampling.plain_numbers import plain_float, plain_int

if TYPE_CHECKING:
    from ee_llm.config import Config

EarlyHead = Literal["final", "raw", "exits"]
"""What turns the hidden state at a boundary into early logits: the final exit's norm and output
weight, its output weight alone, or the own head of the exit at the boundary."""

SLEDVariant = Literal["paper", "released"]
SLEDLayers = Literal["all", "alternate"]
DoLaLayers = Literal["low", "high"]
EARLY_HEADS: tuple[EarlyHead, ...] = ("final", "raw", "exits")
_MOST = 1e6  # of a rate or temperature; beyond it float32 overflows
_MAX_BUCKET = 20  # layers of a DoLa bucket in models of more than 40 layers


@dataclass(frozen=True, kw_only=True)
class SLED:
    """Settings of the strategy `sled` (Self Logits Evolution Decoding, arXiv 2411.02433).

    Attributes:
        rate: Evolution rate: step size by which the final logits follow the early layers. The paper
            uses 0.5 to 3; text degrades at high rates.
        scale: Evolution scale: number of most probable tokens that evolve and may be drawn.
        tau: Temperature of the distributions in the update; ignored by the released variant.
        layers: Boundaries of the early logits (0 is the embedding output), "all" or "alternate"
            (every other one). By default, all from 1 on, and with the released variant from 0 on.
        head: What computes the early logits: "final" (final norm and output weight), "raw" (output
            weight without the norm) or "exits" (the own heads of exits). The default is "final",
            and "raw" for the released variant.
        variant: "paper" follows algorithm 1 of the paper. "released" follows the authors' code:
            similarities are taken over the whole vocabulary and squared, and tau is 1.
        low_value: Added to the logits of all tokens outside the evolution scale.

    Raises:
        RequestError: A field is not valid.
    """

    rate: float = 1.0
    scale: int = 10
    tau: float = 1.0
    layers: int | tuple[int, ...] | SLEDLayers | None = None
    head: EarlyHead | None = None
    variant: SLEDVariant = "paper"
    low_value: float = -1000.0

    def __post_init__(self) -> None:
        for name in ("rate", "tau"):
            value = plain_float(getattr(self, name))
            if value is None or not 1 / _MOST <= value <= _MOST:  # NaN fails too
                raise RequestError(
                    f"sled: {name} = {getattr(self, name)!r} must be a number above 0, from"
                    f" {1 / _MOST:g} to {_MOST:g}"
                )
            object.__setattr__(self, name, value)
        scale, low_value = plain_int(self.scale), plain_float(self.low_value)
        if scale is None or scale < 1:
            raise RequestError(f"sled: scale = {self.scale!r} must be an integer of at least 1")
        if low_value is None or not -_MOST <= low_value < 0.0:  # NaN fails too
            raise RequestError(
                f"sled: low_value = {self.low_value!r} must be a number below 0, from {-_MOST:g} on"
            )
        if self.variant not in ("paper", "released"):
            raise RequestError(
                f"sled: variant {self.variant!r} is unknown. Use 'paper' or 'released'."
            )
        _check_head("sled", self.head)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "low_value", low_value)
        object.__setattr__(self, "layers", _checked("sled", self.layers, ("all", "alternate")))


@dataclass(frozen=True, kw_only=True)
class DoLa:
    """Settings of the strategy `dola` (Decoding by Contrasting Layers, arXiv 2309.03883).

    Attributes:
        layers: Candidate boundaries of the premature layer (0 is the embedding output): a single
            one (static), several, of which each row uses the one whose distribution has the
            greatest Jensen-Shannon divergence from the final one (dynamic), or "low" or "high":
            every other boundary in the lower or upper half of the model, or with the heads of exits
            all exits in that half. By default "low", and all exits with the heads of exits.
        alpha: Only tokens with at least this share of the highest final probability may be drawn,
            in (0, 1].
        head: What computes the early logits: "final" (final norm and output weight), "raw" (output
            weight without the norm, as in the authors' code) or "exits" (the own heads of exits).
            None is "final".

    Raises:
        RequestError: A field is not valid.
    """

    layers: int | tuple[int, ...] | DoLaLayers | None = None
    alpha: float = 0.1
    head: EarlyHead | None = None

    def __post_init__(self) -> None:
        alpha = plain_float(self.alpha)
        if alpha is None or not 0.0 < alpha <= 1.0:  # NaN fails too
            raise RequestError(
                f"dola: alpha = {self.alpha!r} must be a number above 0 and at most 1"
            )
        _check_head("dola", self.head)
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "layers", _checked("dola", self.layers, ("low", "high")))


Contrast = SLED | DoLa
CONTRASTS: Mapping[str, type[SLED] | type[DoLa]] = {"sled": SLED, "dola": DoLa}


def strategy_of(contrast: Contrast) -> Literal["sled", "dola"]:
    """Return the strategy that settings belong to."""
    return "sled" if isinstance(contrast, SLED) else "dola"


def resolve_contrast(contrast: Contrast, config: "Config") -> Contrast:
    """Return settings with the head and the boundaries for a model, in increasing order.

    Raises RequestError if the model has no such boundaries, exits or vocabulary.
    """
    name, layers, num_layers = strategy_of(contrast), contrast.layers, config.model.num_layers
    exits = config.exits.boundaries
    head = contrast.head
    if head is None:
        is_released = isinstance(contrast, SLED) and contrast.variant == "released"
        head = "raw" if is_released else "final"
    if head == "exits" and not exits:
        raise RequestError(
            f"{name}: head = 'exits' needs exits, but the model has none. Use head = 'final'."
        )
    if not isinstance(layers, tuple):
        layers = (_default_exits if head == "exits" else _default_layers)(contrast, config)
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise RequestError(
                f"{name}: layers = {list(layers)}: {layer} is not a boundary of early logits. Use"
                f" numbers from 0 (embedding output) to {num_layers - 1}."
            )
        if head == "exits" and layer not in exits:
            raise RequestError(
                f"{name}: layers = {list(layers)}: {layer} is not an exit. With head = 'exits', use"
                f" some of {list(exits)}."
            )
    if isinstance(contrast, SLED) and contrast.scale > config.model.vocab_size:
        raise RequestError(
            f"sled: scale = {contrast.scale} is above model.vocab_size ="
            f" {config.model.vocab_size}. Use a smaller scale."
        )
    return replace(contrast, layers=layers, head=head)


def contrast_fields(contrast: Contrast) -> dict[str, Any]:
    """Return settings as JSON's own types, for `CONTRASTS[strategy](**fields)`."""
    fields = asdict(contrast)
    layers = fields["layers"]
    return fields | {"layers": list(layers) if isinstance(layers, tuple) else layers}


def _default_layers(contrast: Contrast, config: "Config") -> tuple[int, ...]:
    """Return the boundaries that a name or None stands for, with the head of the final exit."""
    num_layers = config.model.num_layers
    if isinstance(contrast, SLED):
        start = 0 if contrast.variant == "released" or num_layers == 1 else 1
        return tuple(range(start, num_layers, 2 if contrast.layers == "alternate" else 1))
    middle = num_layers // 2
    if contrast.layers == "high":
        return tuple(range(max(middle, num_layers - _MAX_BUCKET), num_layers, 2))
    # With tied embeddings, the first boundaries mostly repeat the input token.
    start = min(2, middle) if config.model.tie_embeddings else 0
    return tuple(range(start, min(middle, _MAX_BUCKET), 2)) or (middle,)


def _default_exits(contrast: Contrast, config: "Config") -> tuple[int, ...]:
    """Return the exits that a name or None stands for; raises RequestError if there are none."""
    exits, middle = config.exits.boundaries, config.model.num_layers // 2
    if contrast.layers == "alternate":
        return exits[::2]
    if contrast.layers not in ("low", "high"):
        return exits
    found = tuple(b for b in exits if (b < middle) == (contrast.layers == "low"))
    if not found:
        half = f"below {middle}" if contrast.layers == "low" else f"from {middle} on"
        raise RequestError(
            f"dola: layers = {contrast.layers!r} with head = 'exits' needs an exit at a boundary"
            f" {half}, but the exits are {list(exits)}. Use layers = {list(exits)}, or head ="
            " 'final'."
        )
    return found


def _check_head(name: str, head: EarlyHead | None) -> None:
    if head is not None and head not in EARLY_HEADS:
        raise RequestError(
            f"{name}: head {head!r} is unknown. Use one of {', '.join(EARLY_HEADS)}."
        )


def _checked(name: str, layers: Any, names: tuple[str, ...]) -> Any:
    """Return `layers` as a sorted tuple, one of `names`, or None; raises RequestError."""
    if layers is None or (isinstance(layers, str) and layers in names):
        return layers
    single = plain_int(layers)
    if single is not None:
        return (single,)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise RequestError(
            f"{name}: layers = {layers!r} is unknown. Use {' or '.join(map(repr, names))}, or a"
            " list of boundaries."
        )
    given, found = list(layers), []
    if not given:
        raise RequestError(f"{name}: layers is empty. Give at least one boundary.")
    for layer in given:
        boundary = plain_int(layer)
        if boundary is None:
            problem = "must be the only value" if layer in names else "is not an integer"
            raise RequestError(
                f"{name}: layers = {given!r}: {layer!r} {problem}. Use"
                f" {' or '.join(map(repr, names))}, or a list of boundaries."
            )
        found.append(boundary)
    if len(set(found)) < len(found):
        raise RequestError(f"{name}: layers = {found} repeats a boundary. Give each once.")
    return tuple(sorted(found))
