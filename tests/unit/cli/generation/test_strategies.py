"""`ee-llm generate --strategy sled` and `dola`: options, records and errors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ee_llm.cli.generation.command import check, generate
from ee_llm.cli.generation.options import GenerateOptions, VerifyOptions
from ee_llm.cli.generation.strategies import strategy_of_options
from ee_llm.cli.generation.verify import verify
from ee_llm.errors import RunError, UserError
from ee_llm.inference.decoding.settings import SLED, DoLa
from ee_llm.inference.exits.policy import make_exit_policy
from tests.unit.inference.models import random_tensors, save_model, tiny_config

CONFIG = tiny_config("gpt", vocab_size=264, max_seq_length=48)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    save_model(output, CONFIG, random_tensors(CONFIG, dtype=torch.float32))
    return output


def test_options_become_settings() -> None:
    options = GenerateOptions(Path("run"), strategy="sled")
    assert strategy_of_options(options) == SLED()
    assert strategy_of_options(replace(options, strategy="dola")) == DoLa()
    low = replace(options, strategy="dola", dola_layers=("low",))
    assert strategy_of_options(low) == DoLa(layers="low")
    given = replace(
        options,
        sled_rate=2.0,
        sled_scale=5,
        sled_tau=0.5,
        sled_layers=(0, 3),
        sled_variant="released",
        dola_layers=("high",),
        dola_alpha=0.3,
        early_head="final",
    )
    assert strategy_of_options(given) == SLED(
        rate=2.0, scale=5, tau=0.5, layers=(0, 3), head="final", variant="released"
    )
    found = strategy_of_options(replace(given, strategy="dola"))
    assert found == DoLa(layers="high", alpha=0.3, head="final")


def test_records_have_the_settings_and_pass_the_certificate(run: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"strategy": "sled", "sled_rate": 3.0, "sled_layers": "alternate"},
        {"strategy": "dola", "dola_layers": [1, 3], "temperature": 0.9},
        {"strategy": "dola", "early_head": "exits", "stop": ["e"]},
        {"strategy": "exact", "thresholds": 0.3},
        {"strategy": "sled", "thresholds": 0.3},
        {"strategy": "sled", "sled_scale": 265},
        {"strategy": "dola", "dola_layers": 4},
        {"strategy": "exact", "sled_scale": 10},
        {"strategy": "dola", "draft_exit": 1},
    ]
    batch, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    batch.write_text("".join(json.dumps({"prompt": "def ", **line}) + "\n" for line in lines))
    options = GenerateOptions(run, batch_file=batch, output=output, dtype="float64", max_tokens=9)
    with pytest.raises(Exception, match="5 of 9"):
        generate(options)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    good = {record["id"]: record for record in records if "error" not in record}
    assert (good["1"]["sled"]["rate"], good["1"]["sled"]["layers"]) == (3.0, [1, 3])
    assert good["2"]["dola"] == {"layers": [1, 3], "alpha": 0.1, "head": "final"}
    assert (good["3"]["dola"]["layers"], good["3"]["dola"]["head"]) == ([1, 2], "exits")
    assert not {"sled", "dola"} & set(good["4"])
    errors = {record["id"]: record["error"]["message"] for record in records if "error" in record}
    assert "--thresholds 0.3 has no effect: --strategy sled" in errors["5"]
    assert "scale = 265 is above model.vocab_size = 264" in errors["6"]
    assert "4 is not a boundary" in errors["7"]
    # A line that names an option means it, also with its default value.
    assert "line 8: --sled-scale 10 has no effect with --strategy exact" in errors["8"]
    assert "line 9: --draft-exit 1 has no effect with --strategy dola" in errors["9"]
    verify(VerifyOptions(output, run))
    good["1"]["sled"]["rate"] = 30.0
    output.write_text(json.dumps(good["1"]) + "\n")
    with pytest.raises(UserError, match="differ from those that the model"):
        verify(VerifyOptions(output, run))
    good["1"]["sled"] = {"speed": 1}
    output.write_text(json.dumps(good["1"]) + "\n")
    with pytest.raises(UserError, match="line 1: 'sled' is .* not settings"):
        verify(VerifyOptions(output, run))
    del good["1"]["sled"]
    output.write_text(json.dumps(good["1"]) + "\n")
    with pytest.raises(UserError, match="line 1: 'sled' is missing"):
        verify(VerifyOptions(output, run))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"thresholds": (0.5,)}, "--thresholds 0.5 has no effect: --strategy sled"),
        ({"policy": Path("a.json")}, "--policy a.json has no effect"),
        ({"measure": "margin"}, "--measure margin has no effect: --strategy sled"),
        ({"strategy": "dola", "measure": "entropy"}, "--measure entropy has no effect"),
        (
            {"strategy": "full", "policy": Path("a.json")},
            "--policy a.json has no effect: --strategy full runs every token",
        ),
        ({"sled_rate": 0.0}, "sled: rate = 0.0"),
        ({"sled_layers": (7,)}, "7 is not a boundary"),
        ({"sled_layers": ("all", 1)}, "'all' must be the only value"),
        ({"sled_layers": ()}, "sled: layers is empty"),
        ({"sled_rate": -1.0}, "sled: rate = -1.0 must be a number above 0"),
        ({"sled_scale": 265}, "sled: scale = 265 is above model.vocab_size = 264"),
        ({"sled_scale": 0}, "sled: scale = 0 must be an integer of at least 1"),
        ({"sled_layers": (3,), "early_head": "exits"}, r"3 is not an exit. .* some of \[1, 2\]"),
        ({"dola_alpha": 0.5}, "--dola-alpha 0.5 has no effect with --strategy sled. Use --str"),
        ({"strategy": "dola", "dola_alpha": 0.0}, "dola: alpha = 0.0 must be a number above 0"),
        ({"strategy": "dola", "dola_alpha": 1.5}, "dola: alpha = 1.5 .* at most 1"),
        ({"strategy": "dola", "dola_layers": ()}, "dola: layers is empty"),
        ({"strategy": "dola", "dola_layers": (4,)}, "4 is not a boundary .* to 3"),
        (
            {"strategy": "dola", "sled_layers": (0, 1)},
            "--sled-layers 0 1 has no effect with --strategy dola. Use --strategy sled, or",
        ),
        (
            {"strategy": "full", "early_head": "raw"},
            "--early-head raw has no effect with --strategy full. Use --strategy sled or dola",
        ),
        (
            {"strategy": "exact", "draft_length": 5},
            "--draft-length 5 has no effect with --strategy exact. Use --strategy self-speculative",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(
    run: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(GenerateOptions(run, "a", **{"strategy": "sled"} | given))
    check(GenerateOptions(run, "a", strategy="sled", thresholds=("off",)))


@pytest.mark.parametrize(
    "given",
    [{"thresholds": (0.5,), "measure": "margin"}, {"policy": "policy.json"}],
    ids=["thresholds", "policy"],
)
def test_an_exit_policy_of_the_command_does_not_apply_to_sled_and_dola(
    run: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    """Lines of a batch may mix strategies; only an exit policy of their own is an error."""
    make_exit_policy((1, 2), [0.5]).save(tmp_path / "policy.json")
    if "policy" in given:
        given = {"policy": tmp_path / given["policy"]}
    lines: list[dict[str, Any]] = [
        {"strategy": "exact"},
        {"strategy": "sled"},
        {"strategy": "dola", "thresholds": "off"},
        {"strategy": "sled", "measure": "margin"},
        {"strategy": "dola", "policy": "own.json"},
    ]
    batch, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    batch.write_text("".join(json.dumps({"prompt": "def ", **line}) + "\n" for line in lines))
    options = GenerateOptions(run, batch_file=batch, output=output, max_tokens=3, **given)
    with pytest.raises(RunError, match="2 of 5"):
        generate(options)
    records = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert {id for id, record in records.items() if "error" not in record} == {"1", "2", "3"}
    assert "--measure margin has no effect" in records["4"]["error"]["message"]
    assert "--policy own.json has no effect" in records["5"]["error"]["message"]


def test_exit_heads_of_a_model_without_exits_are_refused(tmp_path: Path) -> None:
    config = tiny_config("gpt", vocab_size=264, max_seq_length=48, boundaries=())
    save_model(tmp_path, config, random_tensors(config, dtype=torch.float32))
    for strategy in ("sled", "dola"):
        options = GenerateOptions(tmp_path, "a", strategy=strategy, early_head="exits")
        with pytest.raises(
            UserError, match=f"{strategy}: head = 'exits' needs exits, but the model"
        ):
            check(options)
