"""The reference model compared with transformers, and properties of its exits and its mask."""

import pytest
import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.architecture.tensors import tensor_shapes
from tests.unit.inference.models import random_tensors, random_tokens, tiny_config, tiny_model
from tests.unit.inference.peers import gpt2_of_transformers, llama_of_transformers, make_precise


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_final_exit_equals_transformers_llama(tied: bool) -> None:
    config = tiny_config(tie_embeddings=tied, rope_theta=500.0)
    tensors, tokens = random_tensors(config), random_tokens(30)
    ours = ReferenceModel(config, tensors, torch.float64).forward(tokens)[4]
    theirs = llama_of_transformers(config, tensors)
    # transformers computes angles and norms in float32 whatever the dtype ...
    torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], rtol=0, atol=5e-5)
    make_precise(theirs)  # ... and now in float64.
    torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_final_exit_equals_transformers_gpt2(tied: bool) -> None:
    config = tiny_config("gpt", tie_embeddings=tied, num_kv_heads=4)
    tensors, tokens = random_tensors(config), random_tokens(30)
    ours = ReferenceModel(config, tensors, torch.float64).forward(tokens)[4]
    theirs = gpt2_of_transformers(config, tensors)(tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_norm_exit_equals_the_final_exit_of_a_truncated_model() -> None:
    for family, output in (("llama", "own"), ("gpt", "tied"), ("llama", "shared")):
        tied = output == "tied"
        config = tiny_config(family, boundaries=(2,), output=output, tie_embeddings=tied)
        tensors, tokens = random_tensors(config), random_tokens(12)
        cut = tiny_config(family, (), num_layers=2, tie_embeddings=tied)
        cut_tensors = {name: tensors[name] for name in tensor_shapes(cut) if name in tensors}
        if output == "own":
            cut_tensors["output.weight"] = tensors["exits.2.output.weight"]
        exit_logits = ReferenceModel(config, tensors, torch.float64).forward(tokens)[2]
        cut_logits = ReferenceModel(cut, cut_tensors, torch.float64).forward(tokens)[2]
        assert torch.equal(exit_logits, cut_logits)


def _copied(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {
        target + name.removeprefix(source): tensor
        for name, tensor in tensors.items()
        if name.startswith(source)
    }


@pytest.mark.parametrize("family", ["llama", "gpt"])
@torch.no_grad()
def test_mlp_exit_copied_from_its_layer_equals_the_plain_exit(family: str) -> None:
    plain, mlp = tiny_config(family), tiny_config(family, head=("mlp", "norm"))
    tensors, tokens = random_tensors(plain), random_tokens(12)
    copies = dict(tensors)
    for b in (1, 2):
        copies |= _copied(tensors, f"layers.{b}.mlp.", f"exits.{b}.mlp.")
        copies |= _copied(tensors, f"layers.{b}.pre_mlp_layernorm.", f"exits.{b}.mlp_norm.")
    expected = ReferenceModel(plain, tensors, torch.float64).forward(tokens)
    found = ReferenceModel(mlp, copies, torch.float64).forward(tokens)
    assert all(torch.equal(found[b], expected[b]) for b in expected)


@pytest.mark.parametrize("family", ["llama", "gpt"])
@torch.no_grad()
def test_block_exit_copied_from_the_next_layer_equals_the_plain_exit_after_it(family: str) -> None:
    plain = tiny_config(family, boundaries=(2,))
    block = tiny_config(family, boundaries=(1,), head=("block", "norm"))
    tensors, tokens = random_tensors(plain), random_tokens(12)
    copies = {name: tensor for name, tensor in tensors.items() if not name.startswith("exits.2")}
    copies |= _copied(tensors, "exits.2.norm.", "exits.1.norm.")
    copies |= _copied(tensors, "layers.2.", "exits.1.block.")
    expected = ReferenceModel(plain, tensors, torch.float64).forward(tokens)
    found = ReferenceModel(block, copies, torch.float64).forward(tokens)
    assert torch.equal(found[1], expected[2])
    assert torch.equal(found[4], expected[4])


@torch.no_grad()
def test_mlp_after_a_block_reads_the_block() -> None:
    """An mlp of zeros leaves only the block; another mlp changes the logits."""
    block = tiny_config(boundaries=(1,), head=("block", "norm"))
    both = tiny_config(boundaries=(1,), head=("block", "mlp", "norm"))
    tensors, tokens = random_tensors(both), random_tokens(12)
    muted = tensors | {"exits.1.mlp.linear_fc2.weight": torch.zeros(32, 48)}
    only_block = {name: tensors[name] for name in tensor_shapes(block)}
    expected = ReferenceModel(block, only_block, torch.float64).forward(tokens)
    assert torch.equal(ReferenceModel(both, muted, torch.float64).forward(tokens)[1], expected[1])
    found = ReferenceModel(both, tensors, torch.float64).forward(tokens)
    assert not torch.allclose(found[1], expected[1])
    assert torch.equal(found[4], expected[4])


@torch.no_grad()
def test_head_without_parts_projects_the_boundary_itself() -> None:
    config = tiny_config(boundaries=(2,), head=())
    model, tokens = tiny_model(config), random_tokens(6)
    hidden = dict(model.walk(tokens))[2]
    assert hidden.std() > 0.5  # not normalised
    assert torch.equal(model.logits(2, hidden), model.forward(tokens)[2])
    assert not [name for name in tensor_shapes(config) if name.startswith("exits.2")]


@torch.no_grad()
def test_temperature_divides_its_own_exit_only() -> None:
    tokens = random_tokens(6)
    plain = tiny_model().forward(tokens)
    warm = tiny_model(tiny_config(temperatures=(1.0, 2.0))).forward(tokens)
    assert torch.equal(warm[2], plain[2] / 2.0)
    assert torch.equal(warm[1], plain[1])
    assert torch.equal(warm[4], plain[4])


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
@torch.no_grad()
def test_rows_do_not_see_later_rows_and_depend_on_positions(family: str, position: str) -> None:
    config = tiny_config(family, position=position, head=("block", "mlp", "norm"))
    model, tokens = tiny_model(config), random_tokens(16)
    changed = tokens.clone()
    changed[10:] = (changed[10:] + 7) % 40
    before, after = model.forward(tokens), model.forward(changed)
    for boundary in model.boundaries:
        torch.testing.assert_close(before[boundary][:10], after[boundary][:10], rtol=0, atol=1e-12)
        assert (before[boundary][10:] - after[boundary][10:]).abs().amax(dim=-1).min() > 1e-3
    # The mask alone gives deeper layers an order; a single layer has it from positions only.
    single = tiny_model(tiny_config(family, (), position=position, num_layers=1))
    swapped = torch.cat((tokens[:2].flip(0), tokens[2:]))
    assert not torch.allclose(single.forward(swapped)[1][-1], single.forward(tokens)[1][-1])


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 1.0)])
@torch.no_grad()
def test_lower_precision_stays_near_float64(dtype: torch.dtype, atol: float) -> None:
    config, tokens = tiny_config("gpt", position="rope"), random_tokens(20)
    exact = tiny_model(config).forward(tokens)
    rounded = tiny_model(config, dtype=dtype).forward(tokens)
    for boundary in exact:
        assert rounded[boundary].dtype == dtype
        torch.testing.assert_close(rounded[boundary].double(), exact[boundary], rtol=0, atol=atol)


def test_weights_that_do_not_fit_raise() -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    renamed = {name.replace("exits.1.norm", "exits.1.nrom"): t for name, t in tensors.items()}
    with pytest.raises(ValueError, match=r"missing exits\.1\.norm\.weight; unknown .*meant for"):
        ReferenceModel(config, renamed)
    with pytest.raises(ValueError, match=r"configuration: unknown exits\.3\.norm\.weight"):
        ReferenceModel(config, tensors | {"exits.3.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"output\.weight has shape \(39, 32\).*\(40, 32\)"):
        ReferenceModel(config, tensors | {"output.weight": torch.zeros(39, 32)})


def test_invalid_tokens_raise() -> None:
    model = tiny_model()
    for tokens, message in (
        (torch.tensor([3, 40]), "vocab_size = 40"),
        (torch.tensor([-1]), "vocab_size = 40"),
        (random_tokens(33), "max_seq_length = 32"),
        (torch.tensor([], dtype=torch.int64), "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward(tokens)
