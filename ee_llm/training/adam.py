"""Adam with the state layout of FusedAdam, for machines without Transformer Engine and apex.

On such machines megatron-core falls back to torch's AdamW, whose per-parameter step tensors its
distributed optimizer cannot save and load: a load fails on the missing 'step', or returns all
parameters with one shared step tensor (distrib_optimizer.py of 0.16.1, where HAVE_APEX_OR_TE is
False).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from ee_llm import distributed
from ee_llm.errors import UserError


class FusedAdam(torch.optim.Optimizer):
    """Adam with exp_avg and exp_avg_sq per parameter, and the step count per group.

    The interface and the state layout are those of Transformer Engine's FusedAdam, the arithmetic
    is torch's fused kernel. With `adam_w_mode` weight decay is decoupled (Loshchilov and Hutter,
    arXiv 1711.05101), otherwise it is added to the gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        """Raise UserError if `bias_correction` is False: torch's kernels always apply it."""
        if not bias_correction:
            raise UserError(
                "bias_correction=False is not supported, because torch's kernels always apply it. "
                "Use bias_correction=True."
            )
        self.adam_w_mode = adam_w_mode
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def initialize_state(self, param: torch.Tensor) -> None:
        """Set the moments of `param` to zero, as before its first step."""
        zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        self.state[param] = zeros

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the result of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["params"]:
                continue  # FusedAdam does not count steps of an empty group either
            group["step"] = group.get("step", 0) + 1
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        for param in params:
            if not self.state[param]:
                self.initialize_state(param)
        # The kernels increment one step tensor per parameter. These tensors exist only during the
        # call; the step count of the group is authoritative.
        steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
        update = adamw if self.adam_w_mode else adam
        update(
            params,
            [param.grad for param in params],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            list(steps.unbind()),
            fused=True,
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install() -> bool:
    """Make megatron-core use this Adam if it found neither TE nor apex; return whether it does.

    megatron-core then takes the same branches as with Transformer Engine. Further calls change
    nothing.
    """
    distributed.enable_megatron()
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if optimizers.USING_PYTORCH_OPTIMIZER:
        optimizers.Adam = FusedAdam
        optimizers.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.Adam = FusedAdam
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_TE_OPTIMIZER = True
    return optimizers.Adam is FusedAdam
