"""FusedAdam against torch's Adam, and the state layout that megatron-core's checkpoints expect."""

from copy import deepcopy

import pytest
import torch

from ee_llm import distributed
from ee_llm.training.adam import FusedAdam, install

SHAPES = [(5, 3), (7,), (2, 2, 2), ()]


def make_params(dtype):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def groups(params):
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 3e-3}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torch_step_by_step(dtype, decoupled):
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}
    ours, theirs = make_params(dtype), make_params(dtype)
    adam = FusedAdam(groups(ours), adam_w_mode=decoupled, **options)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind(groups(theirs), fused=True, **options)
    for step in range(1, 6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if step == 4:
            ours[1].grad = theirs[1].grad = None
        adam.step()
        reference.step()
        if step < 4:  # later, torch's Adam counts fewer steps for the missing gradient
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other)
    for one, other in zip(ours[2:], theirs[2:], strict=True):
        assert torch.equal(one, other)


def test_equals_the_formula():
    """Guards against an error that FusedAdam shares with torch's own Adam."""
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    adam = FusedAdam([param], lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.5)
    x, m, v = param.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for step, gradient in enumerate([[1.0, 3.0], [-2.0, 0.5]], start=1):
        g = torch.tensor(gradient, dtype=torch.float64)
        param.grad = g.clone()
        adam.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x = x - 0.1 * 0.5 * x
        x = x - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-3)
    torch.testing.assert_close(param.detach(), x, rtol=1e-12, atol=1e-12)


def test_state_layout_is_that_of_fused_adam():
    params = make_params(torch.float32)
    adam = FusedAdam([*groups(params), {"params": []}])
    assert "step" not in adam.param_groups[0]
    for step in range(3):
        set_gradients(params, step)
        adam.step()
    assert [group.get("step") for group in adam.param_groups] == [3, 3, None]
    for param in params:
        assert set(adam.state[param]) == {"exp_avg", "exp_avg_sq"}
        assert adam.state[param]["exp_avg"].shape == param.shape
        assert adam.state[param]["exp_avg"].dtype == param.dtype


def test_resuming_from_a_state_dict_is_bit_identical():
    """With torch's AdamW in megatron-core, step counts are lost or shared after a reload."""
    params, copies = make_params(torch.float32), make_params(torch.float32)
    adam, copy = FusedAdam(groups(params)), FusedAdam(groups(copies))
    for step in range(3):
        set_gradients(params, step)
        adam.step()
    with torch.no_grad():
        for param, target in zip(params, copies, strict=True):
            target.copy_(param)
    copy.load_state_dict(deepcopy(adam.state_dict()))  # a copy, so that they do not share moments
    for step in (3, 4):
        for optimizer, those in ((adam, params), (copy, copies)):
            set_gradients(those, step)
            optimizer.step()
    assert [group["step"] for group in copy.param_groups] == [5, 5]
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_bias_correction_is_required():
    with pytest.raises(ValueError, match="bias_correction"):
        FusedAdam([torch.nn.Parameter(torch.zeros(1))], bias_correction=False)


def test_closure_is_evaluated_with_gradients():
    param = torch.nn.Parameter(torch.ones(1))
    adam = FusedAdam([param], lr=0.1)

    def closure():
        loss = (param**2).sum()
        loss.backward()
        return loss.item()

    assert adam.step(closure) == 1.0
    assert param.item() == pytest.approx(0.9, abs=1e-6)


def test_installed_only_in_place_of_torch(monkeypatch):
    distributed.enable_megatron()
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if not install():
        pytest.skip("Transformer Engine or apex is here, and its Adam is used")
    assert optimizers.Adam is distrib_optimizer.Adam is FusedAdam
    assert install()
    monkeypatch.setattr(optimizers, "Adam", torch.optim.AdamW)  # stands in for TE's FusedAdam
    assert not install()
    assert optimizers.Adam is torch.optim.AdamW
