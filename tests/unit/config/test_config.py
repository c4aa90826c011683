"""Loading, resolving and saving configurations."""

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ee_llm.architecture.partition import exit_stage, stage_layers
from ee_llm.config import SHAPES, Config, default_text, load_config, read_options, section_types
from ee_llm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]

TINY = """
output = "runs/x"

[model]
shape = "llama-tiny"
num_layers = 4

[exits]
boundaries = [1, 2]
weights = [0.1, 0.2]

[optimizer]
lr = 1
"""


def config(**overrides: Any) -> Config:
    """Return llama-tiny with `overrides`, whose names have two underscores instead of a dot."""
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(overrides={"model.shape": "llama-tiny", **named})


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_file_and_defaults(tiny: Path) -> None:
    loaded = load_config(tiny)
    assert loaded.output == "runs/x"
    assert loaded.model.num_layers == 4
    assert loaded.model.hidden_size == 288
    assert loaded.exits.boundaries == (1, 2)
    assert loaded.exits.weights == (0.1, 0.2)
    assert loaded.optimizer.lr == 1.0
    assert isinstance(loaded.optimizer.lr, float)
    assert loaded.parallel.pipeline == 1


def test_overrides_by_dotted_name_or_section_take_precedence_over_the_file(tiny: Path) -> None:
    loaded = load_config(
        tiny, {"output": "y", "model.num_layers": 6, "exits": {"weights": (1.0, 2.0)}}
    )
    assert (loaded.output, loaded.model.num_layers) == ("y", 6)
    assert loaded.exits.weights == (1.0, 2.0)
    assert loaded.exits.boundaries == (1, 2)


def test_load_config_does_not_modify_its_arguments(tiny: Path) -> None:
    section = {"num_layers": 6}
    load_config(tiny, {"model": section, "model.hidden_size": 48})
    assert section == {"num_layers": 6}


def test_saved_configuration_loads_as_an_equal_one(tmp_path: Path) -> None:
    """Every kind of value: escapes, tuples of each type, tiny and huge floats, None, booleans."""
    original = config(
        output='a "quoted"\\\n\ttab \x7f é/日本',
        model__init_std=1e-30,
        model__rope_theta=1e22,
        exits__boundaries=(2, 4),
        exits__head=("block", "norm"),
        exits__weight_schedule="linear",
        exits__initial_weights=(0.5, 0.0),
        parallel__pipeline=3,
        parallel__layer_split=(3, 3, 2),
        data__prefixes=("a", "b'"),
        data__weights=(0.1, 3.0),
        logging__tensorboard=True,
        optimizer__decay_steps=77,
    )
    path = tmp_path / "config.toml"
    path.write_text(original.to_toml(), encoding="utf-8")
    assert load_config(path) == original
    assert load_config(path).to_toml() == original.to_toml()


def test_saved_sizes_are_concrete() -> None:
    """The meaning of a saved file must not change when defaults change."""
    text = config(exits__boundaries=(2, 4)).to_toml()
    for line in ("num_kv_heads = 6", "ffn_hidden_size = 768", "seq_length = 256"):
        assert line in text
    for line in ("weights = [1.0, 1.0]", "temperatures = [1.0, 1.0]"):
        assert line in text


@pytest.mark.parametrize(
    ("shape", "layers", "hidden", "heads", "ffn"),
    [
        ("llama-tiny", 8, 288, 6, 768),
        ("llama-1.3B", 24, 2048, 32, 5632),
        ("llama-7B", 32, 4096, 32, 11008),
        ("llama-13B", 40, 5120, 40, 13824),
        ("llama-30B", 60, 6656, 52, 17920),
    ],
)
def test_shapes(shape: str, layers: int, hidden: int, heads: int, ffn: int) -> None:
    model = load_config(overrides={"model.shape": shape}).model
    assert (model.num_layers, model.hidden_size, model.num_heads) == (layers, hidden, heads)
    assert (model.num_kv_heads, model.head_dim) == (heads, hidden // heads)
    assert model.ffn_hidden_size == ffn
    assert (model.family, model.position) == ("llama", "rope")
    assert shape in SHAPES


def test_options_override_a_shape_and_sizes_derived_from_it() -> None:
    model = config(model__hidden_size=512, model__num_heads=8).model
    assert (model.num_layers, model.head_dim, model.ffn_hidden_size) == (8, 64, 1536)


def test_shape_replaces_all_options_of_another_family(tmp_path: Path) -> None:
    """A saved gpt configuration sets learned positions, biases and more."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 64}
    saved = tmp_path / "saved.toml"
    saved.write_text(Config(model={"family": "gpt", "gelu": "tanh", **sizes}).to_toml())
    model = load_config(saved, {"model.shape": "llama-1.3B", "model.vocab_size": 32000}).model
    expected = load_config(overrides={"model.shape": "llama-1.3B"}).model
    for name in ("position", "qkv_bias", "qk_norm", "gelu", "head_dim", "ffn_hidden_size"):
        assert getattr(model, name) == getattr(expected, name), name


def test_shape_on_the_command_line_replaces_the_sizes_in_the_file(tiny: Path) -> None:
    """Includes a saved file, which sets all sizes, so that the option would have no effect."""
    saved = tiny.with_name("saved.toml")
    saved.write_text(load_config(tiny).to_toml())
    for path in (tiny, saved):
        model = load_config(path, {"model.shape": "llama-7B"}).model
        assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (32, 4096, 11008)
    assert load_config(saved, {"model.shape": "llama-7B"}).model.vocab_size == 4096


def test_gpt_defaults() -> None:
    model = config(model__family="gpt").model
    assert (model.position, model.ffn_hidden_size) == ("learned", 4 * 288)


def test_defaults_across_sections() -> None:
    assert config(model__max_seq_length=64).data.seq_length == 64
    given = config(data__seq_length=32, optimizer__decay_steps=7)
    assert (given.data.seq_length, given.optimizer.decay_steps) == (32, 7)


def test_schedule_of_an_extended_run_ends_at_its_new_last_step(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config(training__steps=50).to_toml(), encoding="utf-8")
    assert load_config(path, {"training.steps": 100}).optimizer.decay_steps is None


def test_configurations_are_immutable() -> None:
    made = config()
    with pytest.raises(ValidationError):
        made.output = "elsewhere"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        made.model.num_layers = 1  # type: ignore[misc]


def test_every_option_is_documented() -> None:
    models = {"": Config, **section_types()}
    assert set(section_types()) == set(Config.model_fields) - {"output"}
    for section, model in models.items():
        assert model.__doc__
        for name, field in model.model_fields.items():
            if section or name not in section_types():
                assert field.description, f"{section}.{name}"
                assert field.description.endswith("."), f"{section}.{name}"
                assert default_text(field), f"{section}.{name}"


def test_shown_defaults_are_the_defaults() -> None:
    """A plain value shown in help is the value of an empty configuration."""
    made = config()
    shown = {"lr": "0.0003", "beta2": "0.95", "schedule": '"cosine"', "clip_grad": "1.0"}
    for name, text in shown.items():
        assert default_text(type(made.optimizer).model_fields[name]) == text
        assert getattr(made.optimizer, name) == (text.strip('"') if '"' in text else float(text))


def test_configuration_page_is_up_to_date() -> None:
    """After a change in ee_llm/config, run python tools/docs/configuration.py."""
    sys.path.insert(0, str(ROOT / "tools" / "docs"))
    try:
        import configuration
    finally:
        sys.path.pop(0)
    page = configuration.page()
    assert configuration.PAGE.read_text(encoding="utf-8") == page
    # Options with the name of a section, such as tuning.checkpoint, used to be missing.
    for section, model in section_types().items():
        table = page.partition(f"## [{section}]")[2].partition("\n## ")[0]
        assert [name for name in model.model_fields if f"| `{name}` |" not in table] == []


def test_file_with_a_byte_order_mark(tiny: Path) -> None:
    plain = load_config(tiny)
    tiny.write_bytes(b"\xef\xbb\xbf" + tiny.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(tiny) == plain


def test_every_shipped_configuration_loads() -> None:
    paths = sorted((ROOT / "examples").glob("**/*.toml"))
    assert paths
    trained = load_config(ROOT / "examples" / "quickstart.toml")
    for path in paths:
        # A tuning configuration takes the model options from its checkpoint.
        is_tuning = "tuning" in read_options(path)
        defaults = {"model": trained.model.model_dump()} if is_tuning else None
        assert load_config(path, defaults=defaults), path


@pytest.mark.parametrize(
    ("layers", "pipeline", "split", "expected"),
    [
        (8, 1, (), [range(1, 9)]),
        (8, 2, (), [range(1, 5), range(5, 9)]),
        (5, 2, (3, 2), [range(1, 4), range(4, 6)]),
        (8, 3, (1, 5, 2), [range(1, 2), range(2, 7), range(7, 9)]),
    ],
)
def test_stage_layers(
    layers: int, pipeline: int, split: tuple[int, ...], expected: list[range]
) -> None:
    made = config(
        model__num_layers=layers, parallel__pipeline=pipeline, parallel__layer_split=split
    )
    assert [stage_layers(made, stage) for stage in range(pipeline)] == expected


@pytest.mark.parametrize("stage", [-1, 2])
def test_stage_layers_outside_the_pipeline(stage: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        stage_layers(config(parallel__pipeline=2), stage)


@pytest.mark.parametrize(("placement", "expected"), [("post", [0, 0, 1, 1]), ("pre", [0, 1, 1, 1])])
def test_exit_stage(placement: str, expected: list[int]) -> None:
    """At a stage's end, post 4 is on the stage that ends with layer 4, and pre 4 on the next."""
    made = config(parallel__pipeline=2, exits__boundaries=(1, 4, 6), exits__placement=placement)
    assert [exit_stage(made, boundary) for boundary in (1, 4, 6, 8)] == expected


def test_exit_stage_of_a_boundary_without_exit() -> None:
    with pytest.raises(ValueError, match=r"no exit at boundary 3: exits.boundaries = \[2\]"):
        exit_stage(config(exits__boundaries=(2,)), 3)


def test_data_size() -> None:
    parallel = config(parallel__tensor=2, parallel__pipeline=2).parallel
    assert [parallel.data_size(world) for world in (4, 8, 16)] == [1, 2, 4]
    for world in (0, 1, 6):
        with pytest.raises(ConfigError, match=r"parallel.tensor = 2 x parallel.pipeline = 2.*4"):
            parallel.data_size(world)


def test_num_microbatches() -> None:
    made = config(training__micro_batch_size=2, training__global_batch_size=12)
    assert [made.num_microbatches(world) for world in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(ConfigError, match=r"global_batch_size = 12 .* x 4 data.*Set it to 16"):
        made.num_microbatches(4)


def test_interleaved_stages_need_a_multiple_of_pipeline_microbatches() -> None:
    made = config(parallel__pipeline=4, parallel__virtual=2, training__global_batch_size=6)
    with pytest.raises(
        ConfigError,
        match=r"gives 6 microbatches, but parallel.virtual = 2 .* parallel.pipeline = 4",
    ):
        made.num_microbatches(4)
    assert (
        config(
            parallel__pipeline=4, parallel__virtual=2, training__global_batch_size=8
        ).num_microbatches(4)
        == 8
    )


def test_tilde_expands_to_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {
        "model.shape": "llama-tiny",
        "output": "~/run",
        "data.prefixes": ("~/a", "b"),
        "data.tokenizer": "~/t.json",
        "checkpoint.initial": "~/c",
        "checkpoint.resume": "~/d",
    }
    config = load_config(None, given)
    assert config.output == "/home/me/run"
    assert config.data.prefixes == ("/home/me/a", "b")
    assert config.data.tokenizer == "/home/me/t.json"
    assert (config.checkpoint.initial, config.checkpoint.resume) == ("/home/me/c", "/home/me/d")
