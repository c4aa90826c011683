"""Exit weights that grow with depth, and curricula of exits (LayerSkip, arXiv 2404.16710).

Exits are numbered j = 0..E-1 in the order of depth; the last one is the final exit. With an exit
after every layer, j is the paper's layer number l.
"""

from collections.abc import Callable, Sequence
from typing import Literal

Curriculum = Literal["none", "rotational", "gradual"]


def depth_scale(layer: int, num_layers: int, scale: float) -> float:
    """Return e(l), the unnormalized weight of the exit after layer l = 0..L-1.

    e(l) = scale * (0 + 1 + ... + l) for l < L-1, and e(L-1) = L-1 + scale * (0 + 1 + ... + L-2)
    (LayerSkip, section 4.1.2).
    """
    below = min(layer, num_layers - 2)
    early = scale * (below * (below + 1) // 2)
    return early if layer < num_layers - 1 else num_layers - 1 + early


def rotational_curriculum(step: int, num_exits: int, interval: int) -> list[bool]:
    """Return C_rot,R(t, j): whether step t trains exit j, for every `interval`-th exit.

    Exit j is enabled if (j - t) mod R = 0, so that each exit is enabled in one of R steps
    (LayerSkip, section 4.1.2). The final exit is always enabled, because a step without it would
    train a model that ends at an early exit.
    """
    enabled = [(exit_ - step) % interval == 0 for exit_ in range(num_exits)]
    return [*enabled[:-1], True]


def gradual_curriculum(step: int, num_exits: int, num_steps: int) -> list[bool]:
    """Return C_grad(t, j): whether step t of T trains exit j, from the last exit to the first.

    Training starts with the final exit, and every T / (2 E) steps the next earlier exit is enabled
    (LayerSkip, section 4.1.2), so that all are enabled in the second half of training.
    """
    num_enabled = 1 + 2 * num_exits * step // num_steps
    return [exit_ >= num_exits - num_enabled for exit_ in range(num_exits)]


def enabled_exits(
    curriculum: Curriculum, step: int, num_exits: int, num_steps: int, interval: int
) -> list[bool]:
    """Return whether `step` (from 0) of `num_steps` trains each exit, the final one included.

    Args:
        curriculum: The name of the curriculum; `none` enables all exits.
        step: The step, from 0.
        num_exits: Number of exits, the final one included.
        num_steps: Number of training steps, for the gradual curriculum.
        interval: Distance of the enabled exits, for the rotational curriculum.
    """
    curricula: dict[str, Callable[[], list[bool]]] = {
        "none": lambda: [True] * num_exits,
        "rotational": lambda: rotational_curriculum(step, num_exits, interval),
        "gradual": lambda: gradual_curriculum(step, num_exits, num_steps),
    }
    return curricula[curriculum]()


def depth_weights(
    boundaries: Sequence[int], num_layers: int, scale: float, enabled: Sequence[bool]
) -> dict[int, float]:
    """Return the loss weights of the exits that a step trains, by boundary.

    The weight of the exit at boundary l + 1 is w(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i), with
    e from `depth_scale` (LayerSkip, section 4.1.2). Exits of weight 0 are left out: those that C
    disables, and the one after the first layer, because e(0) = 0.

    Args:
        boundaries: Boundaries of all exits in increasing order, the final one included.
        num_layers: Number of layers L of the model.
        scale: The paper's e_scale.
        enabled: C(t, l) of each exit.
    """
    scales = {
        boundary: depth_scale(boundary - 1, num_layers, scale)
        for boundary, is_enabled in zip(boundaries, enabled, strict=True)
        if is_enabled
    }
    total = sum(scales.values())
    return {boundary: value / total for boundary, value in scales.items() if value > 0}
