"""Rank files of Megatron-LM and EE-LLM: any layout gives the same model, bit for bit."""

import json
from pathlib import Path

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.cli.main import main
from ee_llm.conversion.open_source import NewExits, open_source
from tests.unit.conversion.huggingface.folders import make_tokenizer
from tests.unit.conversion.huggingface.test_convert_round_trip import run
from tests.unit.conversion.megatron.megatron_files import Writer
from tests.unit.inference.models import random_tensors, tiny_config
from tests.unit.inference.stages import TOKENS

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4)]


def make(family="llama", placement="post", output="own", dtype=torch.float32, **options):
    """Return a model with exits of EE-LLM and more tokens than bytes."""
    sizes = {"num_kv_heads": 4} if family == "gpt" else {}
    config = tiny_config(family, output=output, **(sizes | {"vocab_size": 272} | options))
    config = config.model_copy(
        update={"exits": config.exits.model_copy(update={"placement": placement})}
    )
    return config, random_tensors(config, dtype=dtype)


def assert_same(path, config, tensors, **options):
    """Assert that a run's directory has the options and tensors of this model."""
    source = open_source(path, tokenizer="bytes", **options)
    for section in ("model", "exits"):
        found, expected = (getattr(c, section).model_dump() for c in (source.config, config))
        found.pop("init_std", None), expected.pop("init_std", None)
        assert found == expected
    assert list(source.specs) == list(tensors)
    for name, tensor in tensors.items():
        found = source.tensor(name)
        assert (found.dtype, source.specs[name].dtype) == (tensor.dtype, tensor.dtype)
        assert torch.equal(found, tensor), name
    return source


def with_own_norms(config, tensors):
    """Set the norm of an exit's MLP to that of its layer, because EE-LLM shares it."""
    for boundary in config.exits.boundaries:
        for kind in ("weight", "bias"):
            if (name := f"exits.{boundary}.mlp_norm.{kind}") in tensors:
                tensors[name] = tensors[f"layers.{boundary}.pre_mlp_layernorm.{kind}"]
    return config, tensors


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_any_layout_gives_the_same_model(tmp_path, family, placement, tensor, pipeline):
    tied = family == "gpt"
    output = "tied" if tied else "own"
    config, tensors = make(family, placement, output, tie_embeddings=tied, boundaries=(1, 2, 3))
    assert_same(Writer(config, tensors, tensor, pipeline).write(tmp_path), config, tensors)


HEADS = {
    "bare": (),
    "norm": ("norm",),
    "mlp": ("mlp",),
    "mlp norm": ("mlp", "norm"),
    "block": ("block",),
    "block norm": ("block", "norm"),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("output", ["own", "tied"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_any_head(tmp_path, family, output, head):
    made = make(family, output=output, head=HEADS[head], tie_embeddings=output == "tied")
    config, tensors = with_own_norms(*made)
    assert_same(Writer(config, tensors, 2, 2).write(tmp_path), config, tensors)


@pytest.mark.parametrize("names", ["older", "core"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_names_of_other_versions(tmp_path, names, tied, pipeline):
    config, tensors = make("gpt", boundaries=(), output="shared", tie_embeddings=tied)
    writer = Writer(config, tensors, 2, pipeline, names=names)
    assert_same(writer.write(tmp_path), config, tensors)


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
def test_orders_of_queries_keys_and_values(tmp_path, version):
    """Before version 2 they were [3, head, width] or [head, width, 3], biases included."""
    config, tensors = make("gpt", boundaries=(), output="shared")
    writer = Writer(config, tensors, 2, 1, version=version)
    assert_same(writer.write(tmp_path), config, tensors)


@pytest.mark.parametrize("version", [0, 1.0])
def test_the_order_of_megatron_core_never_changed(tmp_path, version):
    """The version in a file does not matter, and many files state none."""
    config, tensors = make(boundaries=(), output="shared")
    writer = Writer(config, tensors, 2, 2, names="core")
    path = writer.write(tmp_path)
    for file in path.glob("**/*.pt"):
        content = torch.load(file, weights_only=False)
        content["checkpoint_version"] = version
        torch.save(content, file)
    assert_same(path, config, tensors)


def test_virtual_stages(tmp_path):
    config, tensors = make(boundaries=(), output="shared")
    assert_same(Writer(config, tensors, 2, 2, virtual=2).write(tmp_path), config, tensors)


@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"qk_norm": True}])
def test_qkv_biases_and_norms_of_megatron_core(tmp_path, options):
    config, tensors = make(boundaries=(), output="shared", **options)
    names = {"add_qkv_bias": "qkv_bias" in options, "qk_layernorm": "qk_norm" in options}
    writer = Writer(config, tensors, 2, 2, names="core", **names)
    assert_same(writer.write(tmp_path), config, tensors)


def test_exits_in_any_order(tmp_path):
    """The output weights of a stage, and temperatures, have the order of the arguments."""
    config, tensors = make(boundaries=(1, 2, 3), temperatures=(1.0, 2.0, 0.5))
    writer = Writer(config, tensors, 1, 2)
    writer.order = writer.arguments.exit_layer_nums = [3, 2, 1]
    writer.arguments.exit_layer_temperature = [0.5, 2.0, 1.0]
    source = assert_same(writer.write(tmp_path), config, tensors)
    assert any("temperatures" in note for note in source.notes)


def test_rotations_and_gelu(tmp_path):
    for i, (family, options, changes) in enumerate(
        [
            ("llama", {"rope_theta": 500.0}, {"rotary_base": 500}),
            (
                "llama",
                {"rope_scaling": "linear", "rope_factor": 4.0},
                {"rotary_seq_len_interpolation_factor": 4},
            ),
            ("llama", {"rope_scaling": "llama3", "rope_factor": 8.0}, {"use_rope_scaling": True}),
            ("gpt", {"position": "rope"}, {"use_rotary_position_embeddings": True}),
            ("gpt", {"gelu": "tanh"}, {"bias_gelu_fusion": ...}),
            ("gpt", {"gelu": "tanh"}, {"bias_gelu_fusion": False, "openai_gelu": True}),
            ("gpt", {"gelu": "erf"}, {}),
        ]
    ):
        config, tensors = make(family, **options)
        assert_same(Writer(config, tensors, **changes).write(tmp_path / str(i)), config, tensors)


def test_padding_rows_are_removed_with_a_note_or_kept(tmp_path):
    config, tensors = make()
    source = open_source(Writer(config, tensors, 2).write(tmp_path / "a"), tokenizer="bytes")
    assert any("rows 272 to 287" in note for note in source.notes)
    writer = Writer(config, tensors, 2, vocab_size=None)
    source = open_source(writer.write(tmp_path / "b"), tokenizer="bytes")
    assert source.specs["output.weight"].shape == (288, 32)
    assert torch.equal(source.tensor("output.weight")[:272], tensors["output.weight"])
    writer = Writer(config, tensors, 2, vocab_size=271, tokenizer_type="NullTokenizer")
    assert_same(writer.write(tmp_path / "c"), config, tensors)


@pytest.mark.parametrize("head", ["norm", "mlp norm", "block norm"])
def test_the_command_keeps_the_function(tmp_path, capsys, head):
    config, tensors = with_own_norms(*make(head=HEADS[head], dtype=torch.bfloat16))
    expected = ReferenceModel(config, tensors, torch.float32).forward(TOKENS)
    run_path = Writer(config, tensors, 2, 2).write(tmp_path / "theirs")
    run(run_path, "--output", tmp_path / "ours", "--tokenizer", "bytes", "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["tensors"], result["dtypes"]) == (len(tensors), ["bfloat16"])
    assert any("iteration 12" in note for note in result["notes"])
    reader = TensorReader(tmp_path / "ours")
    assert reader.config().training.dtype == "bfloat16"
    found = load_reference(reader).forward(TOKENS)
    assert list(found) == [1, 2, 4]
    for boundary, logits in expected.items():
        assert torch.equal(found[boundary], logits)


@pytest.mark.parametrize(
    ("family", "names", "is_bf16", "has_note"),
    [
        ("llama", "ee-llm", True, True),
        ("llama", "ee-llm", False, False),
        ("llama", "core", True, False),  # megatron-core keeps the frequencies in float32
        ("gpt", "ee-llm", True, False),
    ],
)
def test_rotary_angles_in_bfloat16_are_noted(tmp_path, family, names, is_bf16, has_note):
    config, tensors = make(family, boundaries=(), output="shared")
    writer = Writer(config, tensors, names=names, bf16=is_bf16)
    notes = open_source(writer.write(tmp_path), tokenizer="bytes").notes
    assert any("EE-LLM computes rotary angles in bfloat16" in note for note in notes) == has_note


def test_new_exits_on_a_plain_model(tmp_path):
    config, tensors = make(boundaries=(), output="shared")
    path = Writer(config, tensors, 2, 2).write(tmp_path)
    source = open_source(path, NewExits((1, 3), ("mlp", "norm"), "own"), "bytes")
    expected = ReferenceModel(config, tensors, torch.float32).forward(TOKENS)
    made = {name: source.tensor(name) for name in source.specs}
    assert torch.equal(made["exits.3.output.weight"], tensors["output.weight"])
    assert torch.equal(
        made["exits.3.mlp.linear_fc2.weight"], tensors["layers.3.mlp.linear_fc2.weight"]
    )
    found = ReferenceModel(source.config, made, torch.float32).forward(TOKENS)
    assert torch.equal(found[4], expected[4])


def test_views_of_a_common_buffer_and_parameters(tmp_path):
    """A distributed optimizer has all weights in one buffer, which is saved once."""
    config, tensors = make()
    buffer = torch.cat([tensor.flatten() for tensor in tensors.values()])
    views, start = {}, 0
    for name, tensor in tensors.items():
        view = buffer[start : start + tensor.numel()].view(tensor.shape)
        views[name], start = torch.nn.Parameter(view), start + tensor.numel()
    writer = Writer(config, tensors)
    writer.ours = views
    writer.share = lambda t, tensor, dim=0: tensor
    path = writer.write(tmp_path)
    assert_same(path, config, tensors)


def test_the_command_in_the_documentation(tmp_path, monkeypatch):
    config, tensors = make(vocab_size=300)
    Writer(config, tensors, 2, 2).write(tmp_path / "megatron-run")
    make_tokenizer(tmp_path / "tokenizer.json", 300)
    page = Path(__file__).parents[4] / "docs" / "how-to" / "convert.md"
    section = page.read_text().partition("## From Megatron-LM and EE-LLM")[2]
    program, *arguments = section.split("```")[1].split()
    assert program == "ee-llm"
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert TensorReader("runs/ee").config().exits.boundaries == (1, 2)
