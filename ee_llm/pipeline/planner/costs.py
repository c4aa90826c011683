"""Costs of the pieces of a model and of its stages, and their JSON file."""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ee_llm.architecture.partition import exit_stage, stage_layers
from ee_llm.config import Config
from ee_llm.errors import PlanError
from ee_llm.pipeline.simulate import Costs, PieceCost, StageCost


@dataclass(frozen=True)
class Pieces:
    """Costs of one layer, the embedding, an early exit and the final exit.

    `communication` is the time in seconds to send a hidden state to the next rank.
    """

    layer: PieceCost
    embedding: PieceCost
    exit: PieceCost
    final: PieceCost
    communication: float = 0.0

    def costs(self, config: Config) -> Costs:
        """Return the costs of every stage of the model of `config`.

        An early exit that a curriculum disables in some steps has its mean cost.
        """
        last = config.parallel.num_stages - 1
        stages = []
        for index in range(last + 1):
            num_layers = len(stage_layers(config, index))
            forward, backward, weight = (num_layers * seconds for seconds in self.layer)
            if index == 0:
                forward += self.embedding.forward
                backward += self.embedding.backward
            exits = [
                PieceCost(*(share * seconds for seconds in self.exit))
                for boundary in config.exits.boundaries
                if exit_stage(config, boundary) == index
                and (share := computed_share(config, boundary))
            ]
            if index == last:
                exits.append(self.final)
            stages.append(StageCost(forward, backward, tuple(exits), weight))
        return Costs(tuple(stages), communication=self.communication)


def computed_share(config: Config, boundary: int) -> float:
    """Return the share of the training steps that compute the early exit at `boundary`.

    This is the mean of `ee_llm.losses.curricula` over many steps, whose number is not a multiple of
    a rotation's in general.
    """
    exits = config.exits
    if exits.weighting != "depth":
        return 1.0
    if boundary == 1:  # Its weight is 0.
        return 0.0
    if exits.curriculum == "rotational":
        return 1 / exits.rotation_interval
    if exits.curriculum == "gradual":
        # Of E exits, the n-th before the final one is enabled after n / (2 E) of training.
        num_later = len(exits.boundaries) - exits.boundaries.index(boundary)
        return 1 - num_later / (2 * (len(exits.boundaries) + 1))
    return 1.0


NOMINAL = Pieces(
    layer=PieceCost(forward=1.0, backward=2.0, weight=1.0),
    embedding=PieceCost(forward=0.0, backward=0.0),
    exit=PieceCost(forward=1.0, backward=2.0, weight=1.0),
    final=PieceCost(forward=1.0, backward=2.0, weight=1.0),
)
"""Costs without a measurement: a head costs as much as a layer, as in models of about 1B."""

# The keys of the file, and the names of the numbers under each key.
KEYS: dict[str, tuple[str, ...]] = {
    "layer": ("forward", "backward", "weight"),
    "embedding": ("forward", "backward"),
    "exit": ("forward", "backward", "weight"),
    "final": ("forward", "backward", "weight"),
    "communication": (),
}


def read_pieces(path: Path) -> Pieces:
    """Return the costs in the JSON file `path`, in seconds. `communication` is optional.

    Raises:
        PlanError: The file cannot be read, or a key or value differs from `KEYS`.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file. Write one with --costs-output.") from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not JSON: {error}") from None
    if not isinstance(given, dict):
        raise PlanError(f"{path}: must be an object with the keys {', '.join(KEYS)}")
    for key in given:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The keys are {', '.join(KEYS)}."
            raise PlanError(f"{path}: unknown key {key!r}. {hint}")
    layer, embedding, exit_, final = (
        _piece(path, given, key) for key in ("layer", "embedding", "exit", "final")
    )
    if layer.forward == 0 or layer.backward == 0:
        raise PlanError(f"{path}: layer: forward and backward must be above 0")
    (communication,) = _numbers(path, {"communication": 0, **given}, "communication")
    return Pieces(layer, embedding, exit_, final, communication)


def write_pieces(path: Path, pieces: Pieces) -> None:
    """Write costs to a JSON file that `read_pieces` reads."""
    lines = []
    for key, names in KEYS.items():
        value = getattr(pieces, key)
        lines.append(f'  "{key}": {json.dumps(value[: len(names)] if names else value)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _piece(path: Path, given: Mapping[str, object], key: str) -> PieceCost:
    piece = PieceCost(*_numbers(path, given, key))
    if piece.weight > piece.backward:
        raise PlanError(
            f"{path}: {key}: weight = {piece.weight:g} exceeds backward = {piece.backward:g}, "
            "which includes it"
        )
    return piece


def _numbers(path: Path, given: Mapping[str, object], key: str) -> list[float]:
    names = KEYS[key]
    wanted = f"must be [{', '.join(names)}] in seconds" if names else "must be a number of seconds"
    if key not in given:
        raise PlanError(f"{path}: {key} is missing: it {wanted}")
    value = given[key]
    values = value if isinstance(value, list) and names else [value]
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not len(values) == len(numbers) == (len(names) or 1):
        raise PlanError(f"{path}: {key} = {json.dumps(value)} is not valid: it {wanted}")
    for name, number in zip(names or ("",), numbers, strict=True):
        if not 0 <= number < math.inf:
            where = f"{key}: {name}" if name else key
            raise PlanError(
                f"{path}: {where} = {number:g} is not valid. Give finite seconds of at least 0."
            )
    return numbers
