"""Test `ee-llm plan`: its output, its files and its errors."""

import json
import re
from pathlib import Path

import pytest

from ee_llm.cli import main
from ee_llm.config import load_config
from ee_llm.pipeline.planner import describe
from ee_llm.pipeline.planner.costs import NOMINAL, read_pieces
from ee_llm.pipeline.planner.predict import predict

ROOT = Path(__file__).parents[3]
SMALL = ("--stages", "2", "--microbatches", "2", "--layers", "4", "--exits", "2")


@pytest.fixture
def plan(capsys):
    def run(*arguments, status=0):
        assert main.main(["plan", *map(str, arguments)]) == status
        done = capsys.readouterr()
        assert (done.err == "") == (status == 0)
        return done.err.strip().removeprefix("ee-llm: ") if status else done.out

    return run


@pytest.fixture
def costs(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(
        '{"layer": [0.1, 0.2, 0.08], "embedding": [0, 0.1], "exit": [0.1, 0.1, 0.05],'
        ' "final": [0.1, 0.1, 0.05], "communication": 0.01}'
    )
    return path


def test_golden_output_of_a_small_plan(plan):
    """Every exit takes 1.5 forward passes of 2 layers; the early one hides in idle time."""
    assert plan(*SMALL) == (
        "1F1B: 2 ranks, 2 microbatches, 4 layers (2 each)\n"
        "post-exits at boundary 2 on stage 0\n"
        "\n"
        "rank 0  0F0 0F1 .   .   0B0----------   . 0B1----------\n"
        "rank 1  .   1F0 1B0---------- 1F1 1B1---------- .   .\n"
        "\n"
        "makespan      12   (unit: forward passes of 2 layers)\n"
        "a microbatch  6\n"
        "idle          25.0 %\n"
        "early exits   +0 (+0.0 % of the same plan without them)\n"
        "\n"
        "rank  stages  idle    live microbatches  exit logits  memory\n"
        "0     0       25.0 %  2                  1            5\n"
        "1     1       25.0 %  1                  1            3\n"
        "peaks: live microbatches and exit logits, by stage; memory: in activations of one layer "
        "for one\nmicrobatch, where the logits of an exit count as 1\n"
    )


def test_boundaries_are_separated_by_commas_or_spaces(plan):
    one = plan("--stages", 4, "--microbatches", 4, "--exits", "6,12")
    assert plan("--stages", 4, "--microbatches", 4, "--exits", "6", "12") == one
    assert "6 on stage 0, 12 on stage 1" in one


def test_costs_in_a_file_give_seconds(plan, costs):
    text = plan(*SMALL, "--costs", costs)
    found = predict(small_config(), 2, read_pieces(costs))
    assert f"makespan      {found.simulation.makespan:.4g} s\n" in text
    figures = json.loads(plan(*SMALL, "--costs", costs, "--json", "-"))
    assert figures["unit"] == "s"
    assert figures["makespan"] == found.simulation.makespan
    assert figures["exit_time"] == pytest.approx(found.exit_time)


def small_config(**options):
    values = {"model.num_layers": 4, "model.hidden_size": 8, "model.num_heads": 1}
    values |= {"model.vocab_size": 8, "parallel.pipeline": 2, "exits.boundaries": (2,)}
    return load_config(None, values | options)


def test_files_are_written_and_agree(plan, tmp_path):
    paths = {name: tmp_path / f"plan.{name}" for name in ("png", "trace", "json")}
    options = ("--picture", paths["png"], "--trace", paths["trace"], "--json", paths["json"])
    text = plan(*SMALL, *options)
    assert f"wrote {paths['png']}, {paths['trace']}, {paths['json']}" in text
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    figures = json.loads(paths["json"].read_text())
    spans = [(rank, *span) for rank, spans in enumerate(figures["timeline"]) for span in spans]
    events = json.loads(paths["trace"].read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X" and e["cat"] != "exit"]
    # A nominal unit of time is a millisecond in the trace.
    assert [(e["tid"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in slices] == [
        (rank, name, pytest.approx(1e3 * start), pytest.approx(1e3 * end))
        for rank, name, start, end in spans
    ]
    assert sum(e["ph"] == "X" and e["cat"] == "exit" for e in events) == 4
    assert figures["peak_activations"] == [2, 1]
    assert figures["memory"] == [5, 3]


def test_json_to_standard_output_is_the_only_output(plan):
    assert json.loads(plan(*SMALL, "--json", "-"))["makespan"] == 12


def test_options_take_precedence_over_the_configuration(plan):
    config = ROOT / "examples" / "quickstart.toml"
    text = plan("--config", config)
    assert "1F1B: 2 ranks, 8 microbatches, 8 layers (4 each)" in text
    assert "post-exits at boundary 2 on stage 0, 4 on stage 0" in text
    text = plan("--config", config, "--stages", 4, "--microbatches", 12, "--placement", "pre")
    assert "1F1B: 4 ranks, 12 microbatches, 8 layers (2 each)" in text
    assert "pre-exits at boundary 2 on stage 1, 4 on stage 2" in text
    # Four processes are one pipeline here, not two.
    text = plan("--config", config, "--stages", 4, "--nproc", 4)
    assert "1F1B: 4 ranks, 8 microbatches" in text
    assert "1F1B: 2 ranks, 4 microbatches" in plan("--config", config, "--nproc", 4)
    # The weights in the file are for two exits.
    assert "exits at boundary 1 on" in plan("--config", config, "--exits", "1,2,3")


def test_notes_say_what_a_plan_simplifies(plan):
    """R = 4 over 7 early exits, of which the one after layer 1 is never trained: 6 / 4."""
    options = ("--config", ROOT / "examples" / "layerskip.toml")
    notes = [
        "early exits have their mean times: a step computes 1.5 of 7 on average "
        "(exits.curriculum = rotational)",
        "times include all layers, without what layer_dropout.max_probability = 0.1 saves",
    ]
    assert plan(*options).endswith("\n\n" + "".join(f"note: {note}\n" for note in notes))
    figures = json.loads(plan(*options, "--json", "-"))
    assert figures["notes"] == notes
    # On rank 1, layers take 4 x 3 x 4 microbatches, exits 3 x 3 / 4 x 4 and the final exit 3 x 4.
    busy = [sum(end - start for _, start, end in spans) for spans in figures["timeline"]]
    assert 4 * busy[1] == pytest.approx(48 + 9 + 12)
    assert json.loads(plan(*SMALL, "--json", "-"))["notes"] == []


def test_costs_may_begin_with_a_byte_order_mark(plan, costs):
    options = ("--stages", 4, "--microbatches", 8, "--costs", costs)
    found = plan(*options)
    costs.write_bytes(b"\xef\xbb\xbf" + costs.read_bytes())
    assert plan(*options) == found


def test_auto_is_the_largest_useful_number_of_fills(plan, costs):
    dense = ("--stages", 4, "--microbatches", 8, "--json", "-")
    options = (*dense, "--exits", 6)
    both = ("--fill-warmup", "auto", "--fill-cooldown", "auto")
    figures = json.loads(plan(*options, *both))
    assert (figures["fill_warmup"], figures["fill_cooldown"]) == (2, 2)
    costs.write_text(costs.read_text().replace("[0.1, 0.2, 0.08]", "[0.2, 0.2, 0.08]"))
    figures = json.loads(plan(*options, *both, "--costs", costs))
    assert (figures["fill_warmup"], figures["fill_cooldown"]) == (1, 1)
    for exit_, count in ((12, 1), (18, 0)):
        assert json.loads(plan(*dense, *both, "--exits", exit_))["fill_warmup"] == count
    assert plan(*options, "--fill", "auto") == plan(*options, *both)
    figures = json.loads(plan(*options, "--fill", "auto", "--fill-cooldown", 1))
    assert (figures["fill_warmup"], figures["fill_cooldown"]) == (2, 1)


def test_auto_in_the_configuration_is_resolved(plan, tmp_path):
    path = tmp_path / "run.toml"
    text = (ROOT / "examples" / "quickstart.toml").read_text()
    path.write_text(text.replace("pipeline = 2", 'pipeline = 4\nfill_cooldown = "auto"'))
    assert "1F1B, filled: 2 in cool-down: 4 ranks" in plan("--config", path)
    assert "fill_cooldown" not in plan("--config", path, "--advise").partition("[parallel]")[2]


def test_advice_ends_with_the_configuration_of_its_plan(plan, tmp_path):
    options = ("--stages", 4, "--microbatches", 8, "--exits", "6,12")
    text = plan(*options, "--advise", "--memory-limit", 30)
    assert re.search(r"the best 10 of \d+ plans, the best first:", text)
    assert "more need more memory than --memory-limit" in text
    lines = text.partition("ee-llm train:\n\n")[2]
    path = tmp_path / "run.toml"
    path.write_text(f"{lines}\n[model]\nshape = 'llama-1.3B'\n[training]\nglobal_batch_size = 8\n")
    shown = plan("--config", path)
    assert shown in text.replace(f"in the configuration of ee-llm train:\n\n{lines}", "")


def test_advice_counts_fills_with_the_given_costs(plan, costs):
    """A plan of a run has the ratio of its configuration; advice includes its own ratio."""
    costs.write_text(costs.read_text().replace("[0.1, 0.2, 0.08]", "[0.2, 0.2, 0.08]"))
    config = ROOT / "examples" / "quickstart.toml"
    options = ("--config", config, "--stages", 4, "--costs", costs, "--fill-cooldown", "auto")
    assert "parallel.forward_over_backward = 0.5" in plan(*options)
    text = plan(*options, "--advise")
    assert "filled: 1 in cool-down" in text
    lines = text.partition("ee-llm train:\n\n")[2]
    assert "fill_cooldown = 1\nforward_over_backward = 1.0" in lines


def test_advice_moves_layers_to_stay_within_the_memory_limit(plan):
    """An even split needs 4 microbatches x 6 layers on the first rank."""
    options = ("--stages", 4, "--microbatches", 8, "--advise", "--memory-limit", 20, "--json", "-")
    figures = json.loads(plan(*options))
    assert max(figures["memory"]) <= 20
    assert figures["layers"][0] == 5


def test_advice_for_sizes_that_do_not_divide_evenly(plan):
    figures = json.loads(plan("--stages", 5, "--microbatches", 10, "--advise", "--json", "-"))
    assert sum(figures["layers"]) == 24
    best = figures["candidates"][0]["time_per_microbatch"]
    assert figures["time_per_microbatch"] == best
    kept = plan("--stages", 2, "--microbatches", 4, "--layer-split", "5,6,7,6", "--advise")
    assert "24 layers (per stage 5-6-7-6)" in kept


def test_layers_of_many_stages_are_written_in_runs():
    assert describe.format_split((7, 6, 6, 5)) == "7-6-6-5"
    assert describe.format_split((2,) * 16 + (3,) * 4 + (1,)) == "2x16-3x4-1"


def test_documented_examples_print_the_documented_output(plan, monkeypatch, tmp_path):
    page = (ROOT / "docs" / "how-to" / "plan.md").read_text()
    (tmp_path / "docs" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    examples = re.findall(r"```console\n\$ ee-llm plan (.*?)\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    for command, shown in examples:
        assert plan(*command.split()) == shown


def test_wide_grid_is_shortened_with_a_note():
    found = predict(small_config(), 64, NOMINAL)
    lines = describe.readable_grid(found, 100).splitlines()
    assert max(map(len, lines)) <= 100
    assert all("... " in line for line in lines[:2])
    assert lines[0].startswith("rank 0  0F0")
    assert re.fullmatch(r"\(\d+ of \d+ columns omitted: --picture shows all\)", lines[2])
    assert "left out" not in describe.readable_grid(found, 10_000)


def test_tall_grid_is_shortened_with_a_note():
    values = {"model.num_layers": 40, "parallel.pipeline": 40}
    found = predict(small_config(**values), 2, NOMINAL)
    lines = describe.readable_grid(found, 120).splitlines()
    assert len(lines) == 16 + 2
    assert lines[8] == "..."
    assert lines[9].startswith("rank 32")
    assert "ranks 8 to 31 omitted" in lines[-1]


def test_grid_with_tiny_actions_is_coarser_with_a_note(tmp_path, costs):
    costs.write_text(costs.read_text().replace("[0.1, 0.2, 0.08]", "[0.1, 0.2, 0.0001]"))
    config = small_config(**{"parallel.schedule": "zero-bubble"})
    text = describe.readable_grid(predict(config, 2, read_pieces(costs)), 400)
    assert "shortest actions, which may be hidden" in text
    assert max(map(len, text.splitlines())) < 160


EIGHT = ("--stages", "4", "--microbatches", "8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--microbatches", "8"), "--stages is missing & --config"),
        (("--stages", "4"), "--microbatches is missing & --config"),
        (("--stages", "4", "--microbatches", "0"), "--microbatches 0 & 1 to 65,536"),
        (
            ("--stages", "4", "--microbatches", "6", "--virtual", "2"),
            "--microbatches 6 with 2 stages per rank (--virtual, --layer-split) & --stages 4 & "
            "such as 8",
        ),
        (
            ("--stages", "4", "--microbatches", "6", "--virtual", "2", "--advise"),
            "--microbatches 6 with 2 stages per rank",
        ),
        (
            (
                "--advise",
                "--layer-split",
                "3,3,3,3,3,3,3,3",
                "--stages",
                "4",
                "--microbatches",
                "6",
            ),
            "--microbatches 6 with 2 stages per rank",
        ),
        (
            ("--stages", "4", "--microbatches", "2", "--virtual", "2"),
            "--microbatches 2 with 2 stages per rank (--virtual, --layer-split) & --stages 4 & "
            "such as 4",
        ),
        (
            (*EIGHT, "--virtual", "5"),
            "--layers = 24 & --stages = 4 x --virtual = 5 & --layer-split",
        ),
        ((*EIGHT, "--exits", "24"), "--exits = [24] & 24 & 1..23 & --layers = 24"),
        (
            (*EIGHT, "--exits", "18", "--fill-warmup", "1"),
            "--fill-warmup = 1 & is 0, not 1 & 4 stages & 0.5 & on stage 2 & auto",
        ),
        ((*EIGHT, "--exits", "12", "--fill-warmup", "2"), "--fill-warmup = 2 & 1, not 2 & 4"),
        ((*EIGHT, "--exits", "6", "--fill-warmup", "3"), "--fill-warmup = 3 & 2, not 3 & 4"),
        ((*EIGHT, "--fill-cooldown", "3"), "--fill-cooldown = 3 & 2, not 3 & 4 stages"),
        ((*EIGHT, "--fill-cooldown", "3", "--advise"), "--fill-cooldown = 3 & 2, not 3 & 4"),
        (
            ("--stages", "40", "--microbatches", "8", "--advise"),
            "--layers = 24 & 40 (--stages = 40) & --stages or --virtual",
        ),
        (("--config", "run.toml", "--nproc", "0"), "--nproc 0 & 1 to 65,536"),
        ((*EIGHT, "--nproc", "8"), "--nproc 8 & --config FILE"),
        ((*EIGHT, "--nproc", "8", "--config", "run.toml"), "--nproc 8 and --microbatches 8"),
        (
            (*EIGHT, "--fill-cooldown", "1", "--schedule", "zero-bubble"),
            "--fill-cooldown = 1 & 1F1B & --virtual to 1 & --schedule to 1f1b",
        ),
        ((*EIGHT, "--fill-cooldown", "auto", "--virtual", "2"), "--fill-cooldown = auto & 1F1B"),
        (
            (*EIGHT, "--virtual", "2", "--schedule", "zero-bubble"),
            "--virtual = 2 & --schedule = zero-bubble",
        ),
        ((*EIGHT, "--picture", "plan.pdf"), "--picture plan.pdf & .png"),
        ((*EIGHT, "--profile"), "--profile & --config FILE"),
        ((*EIGHT, "--costs-output", "c.json"), "--costs-output c.json & --profile"),
        ((*EIGHT, "--memory-limit", "9"), "--memory-limit 9 & --advise"),
        (
            (*EIGHT, "--advise", "--memory-limit", "3"),
            "--memory-limit 3 & 9 plans & 24 layer activations & --stages",
        ),
        ((*EIGHT, "--advise", "--memory-limit", "nan"), "--memory-limit nan & above 0"),
        ((*EIGHT, "--advise", "--memory-limit", "-1"), "--memory-limit -1 & above 0"),
        ((*EIGHT, "--logits-size", "-1"), "--logits-size -1.0 & 0 to 1,000,000"),
        ((*EIGHT, "--costs", "no.json"), "no.json"),
        ((*EIGHT, "--costs", "/"), "/ & directory"),
        ((*EIGHT, "--json", "/"), "--json / & folder"),
        *(
            (
                ("--config", "run.toml", "--profile", f"--{name}", f"none/a.{ending}"),
                f"--{name} none/a.{ending} & folder none",
            )
            for name, ending in (
                ("picture", "png"),
                ("trace", "json"),
                ("json", "json"),
                ("costs-output", "json"),
            )
        ),
    ],
)
def test_errors_are_one_line_that_names_the_option(plan, arguments, message):
    error = plan(*arguments, status=2)
    first, *others = message.split(" & ")
    assert error.startswith(first)
    assert [part for part in others if part not in error] == []
    assert "\n" not in error


def test_error_of_negative_costs_names_file_and_key(plan, costs):
    costs.write_text(costs.read_text().replace('"exit": [0.1', '"exit": [-0.1'))
    said = plan(*SMALL, "--costs", costs, status=2)
    assert said == f"{costs}: exit: forward = -0.1 is not valid. Give finite seconds of at least 0."


def test_planning_does_not_import_torch():
    import subprocess
    import sys

    code = (
        "import sys; from ee_llm.cli import main; "
        f"status = main.main(['plan', *{SMALL!r}]); print('torch' in sys.modules, status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False 0"
