"""Test the Python API: the example of the README, from conversion to verification."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ee_llm
from ee_llm.errors import ConfigError
from tests.unit.conversion.huggingface.folders import make_folder

pytestmark = pytest.mark.thorough

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a Llama of random weights and prepared data."""
    place = tmp_path_factory.mktemp("place")
    folder = make_folder(place / "models" / "llama", bos_token_id=7, eos_token_id=9)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    text = place / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    prepare = ["--inputs", text, "--output", place / "data" / "corpus"]
    command = [sys.executable, "-m", "ee_llm", "data", "prepare", *prepare]
    tokenizer = str(folder / "tokenizer.json")
    subprocess.run([*map(str, command), "--tokenizer", tokenizer], check=True, timeout=120)
    return place


def run(code: str, place: Path) -> None:
    """Run Python code in a new process, because training creates process groups."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


TEN_LINES = """
import ee_llm

ee_llm.convert("models/llama", "runs/llama", exits=[1, 2])
tuned = ee_llm.tune("runs/llama", output="runs/tuned", data=["data/corpus"], config="tune.toml")
llm = ee_llm.LLM("runs/tuned", dtype="float32")
params = ee_llm.SamplingParams(max_tokens=12, temperature=0.8, seed=7, stop=["\\n\\n"])
outputs = llm.generate(["Once", "def main("], params, exits={1: 0.9, 2: 0.1})
print(outputs[0].text, outputs[0].mean_depth)
print([(t.text, t.exit, t.confidence) for t in outputs[0].tokens])
streamed = ""
for token in llm.stream("def main(", params, exits={1: 0.9, 2: 0.1}):
    streamed += token.text
answers = llm.chat([{"role": "user", "content": "Hello"}])
report = llm.verify(outputs + answers)

assert {"exit 1 loss", "exit 2 loss"} <= set(tuned.losses), tuned.log
assert "exit 1 loss" in repr(tuned)
assert tuned.checkpoint.is_dir()
assert outputs[0].text == "".join(token.text for token in outputs[0].tokens)
assert 1 <= outputs[0].mean_depth <= 4
assert all(0.0 <= token.confidence <= 1.0 for token in outputs[0].tokens)
assert streamed == outputs[1].text
assert answers[0].prompt == "user: Hello\\nassistant:"
assert report.passed and report.num_generations == 3, report
llm.close()
"""

TUNING = """
[training]
steps = 3
micro_batch_size = 2
global_batch_size = 2
eval_interval = 0
[data]
split = [1.0, 0.0, 0.0]
seq_length = 16
"""


def test_the_example_of_the_readme(place: Path) -> None:
    (place / "tune.toml").write_text(TUNING)
    run(TEN_LINES, place)


TRAIN = """
import json
import ee_llm

config = ee_llm.load_config("train.toml")
plan = ee_llm.plan(config)
assert "makespan" in repr(plan), repr(plan)
assert json.dumps(plan.as_json())
two = ee_llm.train(config, nproc=2)
assert two.checkpoint.is_dir()
alone = {**config.model_dump(), "parallel": {}, "output": "runs/one"}
one = ee_llm.train(alone)
assert {"exit 1 loss", "lm loss"} <= set(one.losses)
for name, loss in one.losses.items():
    assert abs(loss - two.losses[name]) < 1e-4 * loss, (one, two)
"""

TRAINING = """
output = "runs/two"
[model]
num_layers = 2
hidden_size = 16
ffn_hidden_size = 32
num_heads = 2
vocab_size = 1024
max_seq_length = 16
[exits]
boundaries = [1]
[parallel]
pipeline = 2
[data]
split = [1.0, 0.0, 0.0]
prefixes = ["data/corpus"]
tokenizer = "models/llama/tokenizer.json"
[training]
steps = 2
dtype = "float32"
micro_batch_size = 1
global_batch_size = 4
eval_interval = 0
"""


def test_a_model_trains_in_this_process_and_in_several(place: Path) -> None:
    (place / "train.toml").write_text(TRAINING)
    run(TRAIN, place)


def test_errors_name_the_mistake(place: Path) -> None:
    with pytest.raises(TypeError, match="'exit'"):
        ee_llm.convert(place / "models" / "llama", place / "runs" / "x", exit=[1])
    bad_values = {"to": "HF", "exits": ["two"], "head": ["nor"], "max_shard_gb": "many"}
    bad_values |= {"dtype": "int8"}
    for name, value in bad_values.items():
        with pytest.raises(ConfigError, match="^" + re.escape(f"{name} = {value!r}: ")):
            ee_llm.convert(place / "models" / "llama", place / "runs" / "x", **{name: value})
    with pytest.raises(ConfigError, match=r"tuning\.checkpoint"):
        ee_llm.tune(output=place / "runs" / "x")
    with pytest.raises(ee_llm.UserError, match=r"no/such\.toml"):
        ee_llm.train("no/such.toml")


INTERRUPTED = """
import os
import signal
from pathlib import Path
import pytest
import ee_llm
from ee_llm.training import trainer

config = {**ee_llm.load_config("train.toml").model_dump(), "parallel": {}}
with pytest.raises(ee_llm.UserError, match="missing") as error:
    data = {**config["data"], "prefixes": ["data/missing"]}
    ee_llm.train({**config, "output": "runs/x", "data": data}, nproc=2)
assert "missing" in str(error.value)
with pytest.raises(ee_llm.UserError, match="nproc = '2'"):
    ee_llm.train({**config, "output": "runs/x"}, nproc="2")

step = trainer._Trainer.step
def stop_in_the_step(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return step(*arguments)
trainer._Trainer.step = stop_in_the_step
with pytest.raises(ee_llm.RunError, match="SIGINT .* runs/stopped"):
    ee_llm.train({**config, "output": "runs/stopped"})
trainer._Trainer.step = step
result = ee_llm.train({**config, "output": "runs/stopped"})
with (result.output / "log.jsonl").open("a") as log:
    log.write('{"step": 3, "lm lo')
assert result.log[-1]["step"] == 2
(result.output / "log.jsonl").unlink()
assert "step-00000002" in repr(result)
"""


def test_a_run_that_fails_or_is_stopped_raises_an_error(place: Path) -> None:
    """The error states the reason, in one process and in several."""
    (place / "train.toml").write_text(TRAINING)
    run(INTERRUPTED, place)


def test_importing_is_fast_and_every_public_name_exists() -> None:
    code = (
        "import sys, ee_llm\n"
        "assert not {'torch', 'pydantic', 'numpy'} & {*sys.modules}\n"
        "assert all(getattr(ee_llm, name) is not None for name in ee_llm.__all__)\n"
        "assert {*ee_llm.__all__} == {*dir(ee_llm)}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ee_llm.no_such_name
