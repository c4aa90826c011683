"""What a user's mistake in the configuration is answered with: option, value, mend."""

import re
from pathlib import Path
from typing import Any

import pytest

from ee_llm.config import Config, ConfigError, load_config


def message(overrides: dict[str, Any], path: Path | None = None) -> str:
    shape = {} if path else {"model.shape": "llama-tiny"}
    with pytest.raises(ConfigError) as caught:
        load_config(path, {**shape, **overrides})
    text = str(caught.value)
    # pydantic's own report is not for users.
    assert "validation error" not in text
    assert "pydantic" not in text
    return text


CROSS_FIELD = {
    "layers over stages": (
        {"parallel.pipeline": 3},
        "model.num_layers = 8 is not divisible by parallel.pipeline = 3; give "
        "parallel.layer_split, for example [3, 3, 2]",
    ),
    "more stages than layers": (
        {"parallel.pipeline": 9},
        "model.num_layers = 8 is not divisible by parallel.pipeline = 9.*fewer stages",
    ),
    "split of the wrong length": (
        {"parallel.pipeline": 2, "parallel.layer_split": (8,)},
        "parallel.layer_split = [8] must be 2 positive numbers",
    ),
    "split of the wrong sum": (
        {"parallel.pipeline": 2, "parallel.layer_split": (4, 5)},
        "parallel.layer_split = [4, 5] must be 2 .* add up to 8 (model.num_layers), for "
        "example [4, 4]",
    ),
    "empty stage": (
        {"parallel.pipeline": 2, "parallel.layer_split": (8, 0)},
        "parallel.layer_split = [8, 0] must be 2 positive",
    ),
    "heads over tensor": (
        {"parallel.tensor": 4},
        "model.num_heads = 6 is not divisible by parallel.tensor = 4; set parallel.tensor to a "
        "divisor of 6",
    ),
    "key-value heads over tensor": (
        {"parallel.tensor": 2, "model.num_kv_heads": 1},
        "model.num_kv_heads = 1 is not divisible by parallel.tensor = 2",
    ),
    "vocabulary over tensor": (
        {"parallel.tensor": 2, "model.vocab_size": 257},
        "model.vocab_size = 257 is not divisible by parallel.tensor = 2; set "
        "model.vocab_size = 258",
    ),
    "MLP over tensor": (
        {"parallel.tensor": 2, "model.ffn_hidden_size": 77},
        "model.ffn_hidden_size = 77 is not divisible by parallel.tensor = 2; set "
        "model.ffn_hidden_size = 78",
    ),
    "query over key-value heads": (
        {"model.num_kv_heads": 4},
        "model.num_heads = 6 is not divisible by model.num_kv_heads = 4; choose a divisor of 6",
    ),
    "width over heads": (
        {"model.num_heads": 7},
        "model.hidden_size = 288 is not divisible by model.num_heads = 7; change one of them or "
        "give model.head_dim",
    ),
    "odd heads with rotary positions": (
        {"model.head_dim": 5},
        "model.head_dim = 5 is odd.*model.position = learned",
    ),
    "exit before the first layer": (
        {"exits.boundaries": (0, 2)},
        "exits.boundaries = [0, 2]: boundary 0 is outside 1..7",
    ),
    "exit at the last layer": (
        {"exits.boundaries": (2, 8)},
        "exits.boundaries = [2, 8]: boundary 8 is outside 1..7 (model.num_layers = 8.*remove",
    ),
    "exits that decrease": (
        {"exits.boundaries": (4, 2)},
        "exits.boundaries = [4, 2] does not increase; write [2, 4]",
    ),
    "exit given twice": (
        {"exits.boundaries": (2, 2)},
        "exits.boundaries = [2, 2] does not increase; write [2]",
    ),
    "weights not one per exit": (
        {"exits.boundaries": (2, 4), "exits.weights": (0.1, 0.2, 1.0)},
        "exits.weights = [0.1, 0.2, 1.0] has 3 values for 2 exits",
    ),
    "initial weights not one per exit": (
        {
            "exits.boundaries": (2, 4),
            "exits.initial_weights": (1.0,),
            "exits.weight_schedule": "linear",
        },
        "exits.initial_weights = [1.0] has 1 values for 2 exits",
    ),
    "temperatures not one per exit": (
        {"exits.boundaries": (2,), "exits.temperatures": (1.0, 2.0)},
        "exits.temperatures = [1.0, 2.0] has 2 values for 1 exits",
    ),
    "negative weight": (
        {"exits.boundaries": (2,), "exits.weights": (-0.1,)},
        "exits.weights = [-0.1] must not be negative; 0 switches a loss off",
    ),
    "temperature of zero": (
        {"exits.boundaries": (2,), "exits.temperatures": (0.0,)},
        "exits.temperatures = [0.0] must be greater than 0; 1 is neutral",
    ),
    "initial weights without a schedule": (
        {"exits.boundaries": (2,), "exits.initial_weights": (0.5,)},
        "exits.initial_weights = [0.5] has no effect with exits.weight_schedule = constant; set it",
    ),
    "head out of order": (
        {"exits.head": ("norm", "mlp")},
        "exits.head = ['norm', 'mlp'] must name each part once, in order: write ['mlp', 'norm']",
    ),
    "head part given twice": (
        {"exits.head": ("norm", "norm")},
        "exits.head = ['norm', 'norm'] must name each part once, in order: write ['norm']",
    ),
    "mlp head placed pre": (
        {"exits.boundaries": (2,), "exits.head": ("mlp", "norm"), "exits.placement": "pre"},
        "exits.head = ['mlp', 'norm'] with exits.placement = pre.*set exits.placement = post, or "
        "add block",
    ),
    "sequence parallel without tensor parallel": (
        {"parallel.sequence": True},
        "parallel.sequence = true needs tensor parallelism, and parallel.tensor = 1; set "
        "parallel.tensor = 2",
    ),
    "sequence length over tensor": (
        {"parallel.sequence": True, "parallel.tensor": 2, "data.seq_length": 31},
        "data.seq_length = 31 is not divisible by parallel.tensor = 2.*data.seq_length = 30",
    ),
    "sequences longer than the model's": (
        {"data.seq_length": 300},
        "data.seq_length = 300 is greater than model.max_seq_length = 256; lower",
    ),
    "batches that do not divide": (
        {"training.micro_batch_size": 3},
        "training.global_batch_size = 8 is not divisible by training.micro_batch_size = 3; set "
        "the first to 9",
    ),
    "blend weights not one per prefix": (
        {"data.prefixes": ("a", "b"), "data.weights": (1.0,)},
        "data.weights = [1.0] has 1 values for 2 data.prefixes; give one for each, or none",
    ),
    "blend weight of zero": (
        {"data.prefixes": ("a", "b"), "data.weights": (1.0, 0.0)},
        "data.weights = [1.0, 0.0] must be greater than 0; leave out a prefix",
    ),
    "split that does not add up": (
        {"data.split": (0.5, 0.3, 0.1)},
        "data.split = [0.5, 0.3, 0.1] must be three fractions from 0 to 1 that add up to 1",
    ),
    "negative fraction": (
        {"data.split": (1.5, -0.5, 0.0)},
        "data.split = [1.5, -0.5, 0.0] must be three fractions",
    ),
    "lowest learning rate above the highest": (
        {"optimizer.lr": 1e-5, "optimizer.min_lr": 1e-4},
        "optimizer.min_lr = 0.0001 is greater than optimizer.lr = 1e-05; lower",
    ),
    "warm-up longer than the run": (
        {"optimizer.warmup_steps": 1000},
        "optimizer.warmup_steps = 1000 leaves nothing of optimizer.decay_steps = 1000; lower",
    ),
    "wsd without a decay": (
        {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 100},
        "optimizer.wsd_decay_steps = 0 must be from 1 to 900",
    ),
    "decay of a schedule without one": (
        {"optimizer.wsd_decay_steps": 10},
        "optimizer.wsd_decay_steps = 10 has no effect with optimizer.schedule = cosine; set it",
    ),
}


@pytest.mark.parametrize("case", CROSS_FIELD)
def test_cross_field_checks_name_options_values_and_mend(case: str) -> None:
    overrides, expected = CROSS_FIELD[case]
    pattern = re.escape(expected).replace(r"\.\*", ".*").replace(r"\ ", " ")
    found = message(overrides)
    assert re.match(pattern, found), found
    assert "\n" not in found


@pytest.mark.parametrize(
    "overrides",
    [
        {"exits.head": ("block", "mlp", "norm"), "exits.placement": "pre"},
        {"exits.head": ()},
        {"model.hidden_size": 100, "model.num_heads": 6, "model.head_dim": 16},
        {"model.head_dim": 5, "model.position": "learned"},
        {"optimizer.schedule": "constant", "optimizer.warmup_steps": 2000},
        {"parallel.pipeline": 3, "parallel.layer_split": (2, 3, 3)},
        {"parallel.tensor": 2, "parallel.sequence": True},
        {"exits.boundaries": (2,), "exits.initial_weights": (0.0,)},
    ],
)
def test_what_looks_alike_but_is_sound(overrides: dict[str, Any]) -> None:
    assert load_config(overrides={"model.shape": "llama-tiny", **overrides})


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("model.num_layer", "model.num_layers"),
        ("exits.boundary", "exits.boundaries"),
        ("training.lr", "optimizer.lr"),
        ("seed", "training.seed"),
        ("modle.num_layers", "model"),
        ("optimiser.lr", "optimizer"),
        ("checkpoint.keeplast", "checkpoint.keep_last"),
    ],
)
def test_unknown_names_get_the_nearest_valid_one(name: str, mend: str) -> None:
    found = message({name: 1})
    path = name if name.partition(".")[0] not in ("modle", "optimiser") else name.partition(".")[0]
    assert found.startswith(f"{path}: no such option; did you mean {mend}")
    assert re.search(rf"\b{re.escape(mend)}\b( or .*)?\?$", found)


def test_an_unknown_name_like_no_other_gets_the_names_there_are() -> None:
    assert message({"logging.xyzzy": 1}) == (
        "logging.xyzzy: no such option; logging has interval, tensorboard, wandb_mode, "
        "wandb_project"
    )
    assert "ee-llm train --help" in message({"xyzzy": 1})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model.num_layers", "8", 'model.num_layers: must be an integer such as 8, got "8"'),
        ("model.num_layers", 8.0, "model.num_layers: must be an integer such as 8, got 8.0"),
        ("model.num_layers", True, "model.num_layers: must be an integer such as 8, got true"),
        ("model.num_layers", 0, "model.num_layers: must be greater than 0, got 0"),
        ("model.dropout", 1.0, "model.dropout: must be less than 1, got 1.0"),
        ("optimizer.lr", "x", 'optimizer.lr: must be a number such as 0.1, got "x"'),
        ("optimizer.lr", float("nan"), "optimizer.lr: must be a finite number, got nan"),
        ("exits.deferred", 1, "exits.deferred: must be true or false, got 1"),
        ("exits.boundaries", 2, "exits.boundaries: must be a list such as [2, 4], got 2"),
        (
            "exits.boundaries",
            [1, "b"],
            'exits.boundaries: must be an integer such as 8, got "b" (item 2)',
        ),
        ("exits.head", ["nrm"], "exits.head: must be one of 'block', 'mlp' or 'norm', got \"nrm\""),
        ("model.family", "bert", "model.family: must be one of 'llama' or 'gpt', got \"bert\""),
        ("data.split", (1.0,), "data.split: has too few values, got [1.0]"),
        ("parallel", 2, "parallel: must be a table of options, got 2"),
        ("output", "", "output: "),
        ("model.shape", "llama-8B", "model.shape = 'llama-8B' does not exist; choose among llama-"),
    ],
)
def test_values_of_the_wrong_kind(name: str, value: object, expected: str) -> None:
    found = message({name: value})
    assert found.startswith(expected)
    assert "\n" not in found


def test_all_problems_are_reported_together() -> None:
    found = message({"model.num_layer": 1, "optimizer.lr": -1, "exits.placement": "mid"})
    assert found.splitlines()[0] == "3 problems"
    for name in ("model.num_layer:", "optimizer.lr:", "exits.placement:"):
        assert f"\n  {name}" in found
    both = message({"parallel.pipeline": 3, "training.micro_batch_size": 3})
    assert both.splitlines()[0] == "2 problems"


def test_a_model_needs_sizes() -> None:
    with pytest.raises(ConfigError, match="model.num_layers, model.hidden_size, model.num_heads"):
        load_config()
    with pytest.raises(ConfigError, match="^model.num_heads: not given; give a number, or .*shape"):
        load_config(overrides={"model": {"num_layers": 2, "hidden_size": 32, "vocab_size": 64}})


def test_the_constructor_reports_like_the_loader() -> None:
    with pytest.raises(ConfigError, match=r"^exits.boundaries = \[9\]: boundary 9 is outside 1..7"):
        Config(model={"shape": "llama-tiny"}, exits={"boundaries": [9]})  # type: ignore[arg-type]


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_problems_in_a_file_name_it(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\nshape = "llama-tiny"\nnum_layrs = 3\n')
    assert message({}, path) == (
        f"{path}: model.num_layrs: no such option; did you mean model.num_layers?"
    )


def test_an_empty_file_says_what_a_model_needs(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    assert re.match(rf"{re.escape(str(path))}: model.num_layers, .* not given", message({}, path))


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    missing = message({}, path.with_name("runn.toml"))
    assert missing == f"{tmp_path}/runn.toml: no such configuration file; did you mean {path}?"
    assert message({}, tmp_path) == f"{tmp_path}: is a directory; give a TOML file in it"
    assert "not UTF-8 at byte 3" in message({}, write(tmp_path, b"# \xc3\n\xff"[0:2] + b"a\xff"))
    found = message({}, write(tmp_path, "[model]\nshape = llama-tiny\n"))
    assert re.match(r".*run\.toml: not TOML: .*line 2.*; strings need quotes", found)
