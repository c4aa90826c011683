"""What a sweep measures: sets of exits, and options that select the same on the command line."""

from pathlib import Path
from typing import Any

import pytest

from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.generate import COMMAND
from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.cli.generation.strategies import check_strategy_options, strategy_of_options
from ee_llm.errors import RequestError
from ee_llm.evaluation.sweep.candidates import Candidate, execution_arguments, find_candidates
from ee_llm.evaluation.sweep.options import SweepOptions
from ee_llm.inference.exits.policy import ExitPolicy, make_exit_policy, resolve_policy
from tests.unit.evaluation.models import make_config

CONFIG = make_config(boundaries=(1, 2, 3))


def candidates(**given: Any) -> list[Candidate]:
    options = SweepOptions(Path("runs/x"), **given)
    return find_candidates(options, CONFIG, lambda measure: f"of {measure}", gated=(1, 2))


def test_all_sets_thresholds_and_drafts() -> None:
    found = candidates(thresholds=(0.5, 0.9), draft_lengths=(2, 4))
    assert found[0].family == "full"
    assert [one.name for one in found if one.family == "thresholds"] == [
        *("exit 1 at 0.5", "exit 1 at 0.9", "exit 2 at 0.5", "exit 2 at 0.9"),
        *("exit 3 at 0.5", "exit 3 at 0.9", "exits 1+2+3 at 0.5", "exits 1+2+3 at 0.9"),
    ]
    assert [one.strategy for one in found if one.family == "self-speculative"][:2] == [
        one.strategy for one in candidates(draft_exits=(1,), draft_lengths=(2, 4))[-2:]
    ]
    assert len(found) == 1 + 8 + 6


def test_given_sets_are_read_without_repetition() -> None:
    found = candidates(
        exits=("3+1", "1+3", "all", "2"), thresholds=(0.8, 0.8), families=("thresholds",)
    )
    assert [one.policy.thresholds for one in found[1:]] == [
        (0.8, None, 0.8),
        (0.8, 0.8, 0.8),
        (None, 0.8, None),
    ]


@pytest.mark.parametrize("strategy", ["exact", "propagate"])
@pytest.mark.parametrize("measure", ["max_probability", "margin"])
def test_arguments_select_the_same_on_the_command_line(
    tmp_path: Path, measure: Any, strategy: Any
) -> None:
    path = tmp_path / "policy.json"
    ExitPolicy((1, 2, 3), (None, 0.25, 1.0), "entropy").save(path)
    for one in candidates(measure=measure, strategy=strategy, policy=(path,), exits=("2", "all")):
        words = ["--checkpoint", "runs/x", "--prompt", "a", *one.arguments]
        options = parse(GenerateOptions, COMMAND, words)
        check_strategy_options(options)
        assert strategy_of_options(options) == one.strategy
        if one.family in ("thresholds", "policy"):
            thresholds = [None if t == "off" else t for t in options.thresholds]
            found = make_exit_policy((1, 2, 3), thresholds, options.measure)  # type: ignore[arg-type]
            if options.policy is not None:
                found = resolve_policy(options.policy, (1, 2, 3))
            assert found == one.policy


def test_thresholds_are_written_in_full() -> None:
    """Rounded to 1, no token would exit, and names would be equal."""
    values = (0.9999999, 0.99999991)
    found = candidates(exits=("all",), thresholds=values, families=("thresholds",))[1:]
    assert [one.policy.thresholds[0] for one in found] == list(values)
    for one, value in zip(found, values, strict=True):
        assert one.arguments == ("--thresholds", repr(value))
        assert one.name.endswith(f" at {value!r}")


def test_policy_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "p.json", tmp_path / "b" / "p.json", tmp_path / "q.json"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        ExitPolicy((1, 2, 3), (None, 0.25, 1.0)).save(path)
    found = candidates(policy=(*paths, paths[0]), families=())
    assert [one.name for one in found[1:]] == [
        *(f"policy {path}" for path in paths[:2]),
        "policy q.json",
    ]


def test_a_calibrated_policy_must_name_the_model(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    policy = ExitPolicy((1, 2, 3), (None, 0.25, 1.0), "entropy")
    policy.save(path, {"fingerprint": "of entropy"})
    assert candidates(policy=(path,), families=())[1].policy == policy
    policy.save(path, {"fingerprint": "another"})
    with pytest.raises(RequestError, match="calibrated for the model with fingerprint another"):
        candidates(policy=(path,), families=())


def test_agreement_compares_exits() -> None:
    """The first exit that is on has nothing to compare, so alone, it takes no token."""
    found = candidates(measure="agreement", families=("thresholds",), thresholds=(0.8,))
    assert [one.name for one in found] == ["full", "exits 1+2+3 at 0.8"]


def test_execution_of_the_command() -> None:
    """The options are those of `ee-llm generate`."""
    assert execution_arguments(SweepOptions(Path("runs/x"), batch_size=16)) == ()
    template = Path("chat template.jinja")
    given: dict[str, Any] = {"dtype": "bfloat16", "attention": "plain", "chat_template": template}
    given |= {"tensor": 2, "pipeline": 3, "cuda_graphs": True, "compile": True, "timeout_s": 20}
    words = execution_arguments(SweepOptions(Path("runs/x"), batch_size=17, **given))
    options = parse(GenerateOptions, COMMAND, ["--checkpoint", "runs/x", *words])
    assert options.max_num_seqs == 17
    assert {name: getattr(options, name) for name in given} == given


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such exit": ({"exits": ("2+7",)}, r"exits: 7 is not an exit. The model has .*\[1, 2, 3\]"),
    "no set": ({"exits": ("2,3",)}, "exits: '2,3' is not a set of exits. Write 8 for one exit"),
    "no such draft": ({"draft_exits": (4,)}, "draft_exits: 4 is not an exit"),
    "no policy": ({"policy": (Path("gone.json"),)}, r"Policy file gone\.json cannot be read"),
    "no gate": (
        {"measure": "gate", "exits": ("1", "2+3")},
        r"exits 2\+3 at 0.5: measure = 'gate' needs a gate for the exit after layer 3",
    ),
    "alone": (
        {"measure": "agreement", "exits": ("1+2", "2")},
        "exits: no token exits at 2 alone with measure = 'agreement'",
    ),
    "nothing": ({"families": ()}, "there is nothing to measure"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named(case: str) -> None:
    given, expected = REFUSED[case]
    with pytest.raises(RequestError, match=expected):
        candidates(**given)
