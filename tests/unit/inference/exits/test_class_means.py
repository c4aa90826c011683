"""Compare class-aware output weights with a loop over all tokens of the reference model."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.config import Config
from ee_llm.data.indexed import IndexedWriter
from tests.unit.checkpoint.surgery.sources import HEADS, all_tensors, refusal, run, save, tiny

pytestmark = pytest.mark.thorough

EOD = 256
LENGTH = 16  # tokens in a window
DOCUMENTS = [
    [*range(40, 75), EOD],
    [*(7, 7, 9, 7, 7, 9, 250), EOD],
    [*np.random.default_rng(0).integers(0, 60, 50).tolist(), EOD],
]
TOKENS = [*itertools.chain(*DOCUMENTS)]


def write_data(prefix, documents) -> str:
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add(document)
        writer.commit()
    return str(prefix)


@pytest.fixture
def data(tmp_path) -> str:
    return write_data(tmp_path / "data", DOCUMENTS)


def naive(reader: TensorReader, boundary: int, tokens: list[int], mask_after_eos=False) -> Tensor:
    """Compute the weight [v, h] of an existing exit token by token and class by class."""
    model = load_reference(reader, torch.float64)
    seen: dict[int, list[Tensor]] = {}
    for start in range(0, len(tokens) - 1, LENGTH):
        window = tokens[start : start + LENGTH + 1]
        hidden = dict(model.walk(torch.tensor(window[:-1])))[boundary]
        for position, target in enumerate(window[1:]):
            if mask_after_eos and window[position] == EOD:
                continue
            state = hidden[position]
            seen.setdefault(target, []).append(state / state.norm())
    weight = reader.tensor("output.weight").double().clone()
    means = {target: torch.stack(states).mean(dim=0) for target, states in seen.items()}
    length = sum(float(mean.norm()) for mean in means.values()) / len(means)
    for token in range(len(weight)):
        row = weight[token]
        weight[token] = means[token] if token in means else row * (length / row.norm())
    return weight


def add(source, output, *options: object) -> TensorReader:
    how = ("--initialization", "class-aware", "--seq-length", LENGTH)
    run("add-exits", source, *how, "--output", output, *options)
    return TensorReader(output)


@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("head", [("norm",), ("mlp", "norm"), ("block", "norm"), ()])
def test_the_rows_are_class_means(tmp_path, data, family, head):
    dense = save(tmp_path / "dense", tiny(family, boundaries=()), dtype=torch.float32)
    options = ("--data", data, "--exits", 1, 3, "--head", *head)
    found = add(dense.path, tmp_path / "more", *options)
    assert found.config().exits.output == "own"
    assert found.config().exits.head == head
    for boundary in (1, 3):
        weight = found.tensor(f"exits.{boundary}.output.weight")
        expected = naive(found, boundary, TOKENS)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5)
        unseen = [token for token in range(260) if token not in TOKENS[1:]]
        assert len(unseen) > 100
        ours, final = weight[unseen], dense.tensor("output.weight")[unseen]
        assert torch.cosine_similarity(ours, final).min() > 0.9999
    again = add(dense.path, tmp_path / "again", *options)
    for name, tensor in all_tensors(found).items():
        assert torch.equal(again.tensor(name), tensor), "not the same twice"


def test_other_exits_and_the_model_do_not_change(tmp_path, data):
    source = save(tmp_path / "source", tiny(boundaries=(2,), **HEADS["own outputs"]))
    found = add(source.path, tmp_path / "more", "--data", data, "--exits", 3)
    for name, tensor in all_tensors(source).items():
        assert torch.equal(found.tensor(name), tensor)
    assert found.dtype("exits.3.output.weight") == torch.bfloat16


def test_a_tied_model_falls_back_to_its_embedding(tmp_path, data):
    dense = save(tmp_path / "dense", tiny(boundaries=(), tie_embeddings=True), dtype=torch.float32)
    found = add(dense.path, tmp_path / "more", "--data", data, "--exits", 2)
    weight, words = found.tensor("exits.2.output.weight"), dense.tensor("embedding.word.weight")
    assert torch.cosine_similarity(weight[259], words[259], dim=0) > 0.9999


def test_num_tokens_counts_over_several_data_sets(tmp_path, data):
    """The first data set has only seven predicted tokens; the second contributes 33."""
    first = write_data(tmp_path / "first", [DOCUMENTS[1]])
    dense = save(tmp_path / "dense", tiny(boundaries=()), dtype=torch.float32)
    some = add(
        dense.path,
        tmp_path / "more",
        *("--data", first, data, "--exits", 2, "--num-tokens", 40),
    )
    alone = add(dense.path, tmp_path / "one", "--data", first, "--exits", 2)
    weight = some.tensor("exits.2.output.weight")
    is_final = torch.cosine_similarity(weight, dense.tensor("output.weight")) > 0.9999
    assert [bool(is_final[t]) for t in (7, 9, 250, 41, 73, 74)] == [False] * 5 + [True]
    assert torch.equal(weight[250], alone.tensor("exits.2.output.weight")[250])


def test_masked_tokens_are_not_counted(tmp_path, data):
    """With data.mask_after_eos, the first token of the next document is not a target."""
    config = Config(**tiny(boundaries=()).model_dump() | {"data": {"mask_after_eos": True}})
    dense = save(tmp_path / "dense", config, dtype=torch.float32)
    found = add(dense.path, tmp_path / "more", "--data", data, "--exits", 2)
    weight = found.tensor("exits.2.output.weight").double()
    expected = naive(found, 2, TOKENS, mask_after_eos=True)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weight, naive(found, 2, TOKENS), rtol=1e-3, atol=1e-4)


REFUSED = {
    "no data": ((), "Give --data with the prefixes"),
    "no such data": (("--data", "gone"), "gone.idx does not exist"),
    "no tokens": (("--num-tokens", 0), "there is nothing to predict"),
    "too long": (("--seq-length", 33), "1 to 32 (model.max_seq_length)"),
    "shared": (("--exit-output", "shared"), "(exits.output = shared). Use --exit-output own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_refused(tmp_path, capsys, data, case):
    options, expected = REFUSED[case]
    if case not in ("no data", "no such data"):
        options = ("--data", data, *options)
    dense = save(tmp_path / "dense", tiny(boundaries=()))
    how = ("--exits", 2, "--initialization", "class-aware", "--output", tmp_path / "made")
    assert expected in refusal(capsys, "add-exits", dense.path, *how, *options)
    assert not (tmp_path / "made").exists()


def test_data_with_a_larger_vocabulary_is_refused(tmp_path, capsys):
    other = write_data(tmp_path / "other", [[1, 2, 300, 4]])
    dense = save(tmp_path / "dense", tiny(boundaries=()))
    how = ("--exits", 2, "--initialization", "class-aware", "--output", tmp_path / "made")
    found = refusal(capsys, "add-exits", dense.path, *how, "--data", other)
    assert "token ids 1 to 300, outside model.vocab_size = 260" in found
