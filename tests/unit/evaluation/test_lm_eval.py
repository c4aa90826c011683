"""lm_eval with the model `ee_llm` gives the results of its Hugging Face adapter, and clear errors.

The tasks are YAML files with local data, and nothing is downloaded.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import ee_llm
from ee_llm import distributed
from ee_llm.errors import CheckpointError, DataError, RequestError
from ee_llm.evaluation.harness.model import EarlyExitLM
from tests.unit.conversion.huggingface.folders import make_model
from tests.unit.data.tokenization.families import FAMILIES, write_family

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[3]
SIZES = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
QUESTIONS = [
    {"question": "What is the capital of France?", "choices": ["Paris", "Rome"], "answer": 0},
    {"question": "What is the capital of Italy?", "choices": ["Paris", "Rome"], "answer": 1},
    {"question": "How are you today?", "choices": ["area", "user assistant"], "answer": 1},
    {"question": "width * height", "choices": ["  12345 tokens", "naïve café"], "answer": 0},
]
COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{text}"
"""
TASKS = {
    "choices": (
        "{{question}} Answer:",
        "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},"
        " {metric: acc_norm, aggregation: mean, higher_is_better: true}]\n",
    ),
    "answers": (
        "{{question}}",
        "output_type: generate_until\ndoc_to_target: '{{choices[answer]}}'\n"
        "generation_kwargs: {until: ['e', '<|im_end|>'], max_gen_toks: 12}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    ),
    "perplexity": (
        "",
        "output_type: loglikelihood_rolling\ndoc_to_target: '{{question * 12}}'\n"
        "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity,"
        " higher_is_better: false}]\n",
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, (text, rest) in TASKS.items():
        content = f"task: {name}\n{COMMON.format(data=data, text=text)}{rest}"
        (folder / f"{name}.yaml").write_text(content)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the prepared data sets of the datasets library out of the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("cache"))
        patch.setenv("HF_HOME", folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


class Models:
    """A checkpoint with early exits, and the dense model and its first layers for transformers."""

    def __init__(self, folder: Path, family: str) -> None:
        original = write_family(family, folder / "original")
        eos = json.loads((original / "generation_config.json").read_text())["eos_token_id"]
        model = make_model("llama", SIZES | {"eos_token_id": eos})
        model.save_pretrained(original)
        self.checkpoint, quiet = folder / "run", {"progress": False}
        ee_llm.convert(original, self.checkpoint, exits=(1, 2), **quiet)
        self.dense, self.truncated = folder / "dense", folder / "truncated"
        ee_llm.convert(self.checkpoint, self.dense, to="hf", dense=True, **quiet)
        ee_llm.convert(self.checkpoint, self.truncated, to="hf", truncate_at=2, **quiet)

    def ours(self, **arguments: Any) -> EarlyExitLM:
        return EarlyExitLM(pretrained=str(self.checkpoint), dtype="float32", **arguments)

    def theirs(self, truncated: bool = False, **arguments: Any) -> HFLM:
        folder = self.truncated if truncated else self.dense
        return HFLM(pretrained=str(folder), dtype="float32", device="cpu", **arguments)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("llama"), "llama-3.1")


def run(lm: Any, tasks: Path, chat: bool = False) -> dict[str, Any]:
    """Return the results of all tasks, with their samples."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    loaded = manager.load(sorted(TASKS))
    return evaluate(lm, loaded, bootstrap_iters=0, log_samples=True, apply_chat_template=chat)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for task in TASKS:
        found, expected = ours["results"][task], theirs["results"][task]
        for metric, value in expected.items():
            if isinstance(value, float):
                assert found[metric] == pytest.approx(value, rel=1e-4), (task, metric)
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            for mine, reference in zip(one["resps"], other["resps"], strict=True):
                if task == "answers":
                    assert mine == reference
                elif task == "perplexity":
                    assert mine[0] == pytest.approx(reference[0], rel=1e-4)
                else:
                    assert mine[0][0] == pytest.approx(reference[0][0], abs=1e-4)
                    assert mine[0][1] == reference[0][1]


@pytest.mark.parametrize("truncated", [False, True])
def test_tasks_equal_those_of_the_hugging_face_adapter(
    models: Models, tasks: Path, truncated: bool
) -> None:
    """An exit that always predicts is the model that ends there."""
    ours = models.ours(**({"exit": 2} if truncated else {}))
    found = run(ours, tasks)
    assert_equal(found, run(models.theirs(truncated), tasks))
    depth = 2 if truncated else 4
    info = json.loads(json.dumps(ours.get_model_info()))
    for kind in ("loglikelihood", "generate_until"):
        assert info["exits"][kind]["mean_depth"] == depth
    texts = [sample["resps"][0][0] for sample in found["samples"]["answers"]]
    assert len(set(texts)) > 1, "all generations are equal, so the test shows little"


def test_conversations_equal_those_of_the_hugging_face_adapter(models: Models, tasks: Path) -> None:
    assert_equal(run(models.ours(), tasks, True), run(models.theirs(), tasks, True))


def test_an_answer_can_be_continued(models: Models) -> None:
    history = [
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "The capital is "},
    ]
    ours, theirs = models.ours(), models.theirs()
    for prompt in (True, False):
        text = ours.apply_chat_template(history, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(history, add_generation_prompt=prompt)
    assert text.rstrip().endswith("The capital is")


@pytest.mark.parametrize("family", ["llama-3.1", "qwen-2.5", "gpt-2", "smollm-2"])
def test_texts_are_encoded_as_by_the_hugging_face_adapter(tmp_path: Path, family: str) -> None:
    models = Models(tmp_path, family)
    special = FAMILIES[family].special
    texts = ["", "Hello there", " Hello  ", "area\n", special, f"x {special}", "日本語 naïve"]
    for more in ({}, {"add_bos_token": True}, {"add_bos_token": False}):
        if more == {"add_bos_token": True} and family != "llama-3.1":
            continue  # the tokenizer of transformers adds none, whatever it is told
        ours, theirs = models.ours(**more), models.theirs(**more)
        assert ours.prefix_token_id == theirs.prefix_token_id
        assert ours.eot_token_id == theirs.eot_token_id
        assert ours.max_length == theirs.max_length == 256
        for text in texts:
            for add in (None, False):
                assert ours.tok_encode(text, add) == theirs.tok_encode(text, add), text
        for context in texts[1:]:
            pairs = [lm._encode_pair(context, " Paris is") for lm in (ours, theirs)]
            assert pairs[0] == pairs[1], context


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_long_and_empty_contexts_equal_those_of_the_hugging_face_adapter(models: Models) -> None:
    """Contexts are cut on the left, and an empty one becomes the beginning-of-sequence token."""
    long = "The capital of France is Paris. " * 90
    requests = instances("loglikelihood", (long, " Rome"), ("", "Rome"), (long, " Paris. Rome"))
    generating = instances("generate_until", (long, {"until": ["e"], "max_gen_toks": 30}))
    ours, theirs = models.ours(max_length=200), models.theirs(max_length=200)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for one, other in zip(ours.loglikelihood(requests, disable_tqdm=True), expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    found = ours.generate_until(generating, disable_tqdm=True)
    assert found == theirs.generate_until(generating, disable_tqdm=True)


def test_results_do_not_depend_on_the_batch_size(models: Models) -> None:
    generation = {"max_gen_toks": 9, "do_sample": True, "temperature": 1.0}
    texts = [question["question"] for question in QUESTIONS]
    requests = instances("generate_until", *((t, generation) for t in [*texts, texts[0]]))
    options = {"threshold": 0.03, "measure": "margin"}
    first = models.ours(max_num_seqs=1, **options).generate_until(requests, disable_tqdm=True)
    lm = models.ours(batch_size=7, **options)
    assert lm.generate_until(requests, disable_tqdm=True) == first
    assert first[0] != first[-1], "repetitions of a request draw the same sample"
    assert len(lm.get_model_info()["exits"]["generate_until"]["share_by_exit"]) > 1


def test_speculation_is_said_to_have_no_effect_on_likelihoods(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    requests = instances("loglikelihood", ("Hello", " there"), ("Hello", " you"))
    lm = models.ours(strategy="self-speculative", draft_exit=1, draft_length=3)
    for _ in range(2):
        found = lm.loglikelihood(requests, disable_tqdm=True)
    assert found == models.ours().loglikelihood(requests, disable_tqdm=True)
    assert [r.message for r in caplog.records if "self-speculative" in r.message] == [
        "strategy = 'self-speculative' does not affect likelihood tasks: nothing is generated, and"
        " the final exit scores every token."
    ]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"polcy": "p.json"}, "model_args: 'polcy' is unknown. Use one of add_bos_token,"),
    "unknown of SLED": ({"strategy": "sled", "sled_speed": 2}, "sled_speed is unknown. Use one of"),
    "of another strategy": ({"sled_rate": 2.0}, "sled_rate belongs to strategy = 'sled', but"),
    "no such exit": ({"exit": 3}, "exit = 3 is not an exit of the model. Use one of 1, 2, final"),
    "two ways": ({"exit": 1, "threshold": 0.5}, "threshold = 0.5 and exit = 1 are given. Use one"),
    "full depth": ({"strategy": "full", "threshold": 0.5}, "so threshold = 0.5 has no effect"),
    "no exits chosen": ({"strategy": "propagate"}, "strategy = 'propagate' needs exits. Give"),
    "measure": ({"measure": "margin"}, "measure = 'margin' needs threshold"),
    "threshold": ({"threshold": 1.5}, "1.5 is not in (0, 1]"),
    "strategy": ({"strategy": "fast"}, "strategy = 'fast' is unknown. Use one of exact, full"),
    "dtype": ({"dtype": "float16"}, "dtype = 'float16' is unknown. Use one of auto, float32"),
    "max_length": ({"max_length": 300}, "max_length = 300 is above the model's max_seq_length"),
    "tensor": ({"tensor": 3}, "tensor = 3 does not divide num_kv_heads = 2"),
    "draft_exit": (
        {"strategy": "self-speculative", "draft_exit": 99},
        "draft_exit = 99 is not an exit. The model has exits at [1, 2]",
    ),
    "max_num_seqs": ({"max_num_seqs": 0}, "max_num_seqs = 0 must be an integer from 1 to 16384"),
    "cache_tokens": ({"cache_tokens": "x"}, "cache_tokens = 'x' must be an integer from 1 to"),
    "max_gen_toks": ({"max_gen_toks": 0}, "max_gen_toks = 0 must be an integer from 1 to"),
    "no tensor": ({"tensor": None}, "tensor = None must be an integer from 1 to"),
    "exit": ({"exit": True}, "exit = True must be a number of layers, or final"),
    "number as policy": ({"policy": 12}, "policy = 12 is not a path. Write ./12 for a file"),
    "two names": ({"checkpoint": "runs/b"}, "and checkpoint = runs/b mean the same, but both"),
    "device": ({"device": "cuda:7"}, "device = 'cuda:7' (--device) is not the device in use"),
    "no policy file": ({"policy": "gone.json"}, "Policy file gone.json cannot be read"),
}


def test_a_missing_chat_template_is_found_before_the_tasks(models: Models) -> None:
    with pytest.raises(DataError, match="chat_template gone.jinja cannot be read"):
        models.ours(chat_template="gone.jinja")


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0", str(distributed.device())])
def test_default_devices_are_accepted_everywhere(models: Models, device: str | None) -> None:
    assert models.ours(device=device).options.device == device


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_are_refused(models: Models, case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        EarlyExitLM(pretrained=str(models.checkpoint), **arguments)
    assert message in str(caught.value)


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="pretrained is missing. Give --model_args pretrained="):
        EarlyExitLM()
    with pytest.raises(RequestError, match="pretrained = 12 is not a path. Write ./12"):
        EarlyExitLM(checkpoint=12)
    with pytest.raises(CheckpointError, match="gone"):
        EarlyExitLM(pretrained=str(tmp_path / "gone"))


def test_the_policy_of_another_model_is_an_error(models: Models, tmp_path: Path) -> None:
    with ee_llm.LLM(models.checkpoint, exits=0.5) as llm:
        llm.policy.save(tmp_path / "own.json", {"fingerprint": llm.fingerprint})
        llm.policy.save(tmp_path / "other.json", {"fingerprint": "0" * 16})
    assert models.ours(policy=tmp_path / "own.json").decoding.strategy == "exact"
    with pytest.raises(RequestError, match="other.json was calibrated for the model with finger"):
        models.ours(policy=tmp_path / "other.json")


REFUSED_REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown setting": ({}, {"num_beams": 4}, "generation_kwargs: num_beams = 4 is not supported"),
    "no tokens": ({}, {"max_gen_toks": 0}, "max_gen_toks = 0 must be at least 1"),
    "no number": (
        {},
        {"max_gen_toks": "many"},
        "generation_kwargs = {'max_gen_toks': 'many'}: inv",
    ),
    "no room": ({}, {"max_gen_toks": 256}, "max_gen_toks = 256 leaves no room for a prompt"),
}


@pytest.mark.parametrize("case", REFUSED_REQUESTS)
def test_generation_settings_are_refused(models: Models, case: str) -> None:
    arguments, generation, message = REFUSED_REQUESTS[case]
    with pytest.raises(RequestError, match=message):
        models.ours(**arguments).generate_until(instances("generate_until", ("Hi", generation)))


def test_likelihoods_are_refused_on_several_ranks(models: Models) -> None:
    with pytest.raises(RequestError, match="likelihood tasks run on one device only"):
        models.ours(tensor=2).loglikelihood(instances("loglikelihood", ("a", "b")))


def python(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the entry points of pyproject.toml, as an installation has them."""
    installed = folder / "installed" / "ee_llm-0.0.0.dist-info"
    installed.mkdir(parents=True, exist_ok=True)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for g, e in groups.items()]
    (installed / "entry_points.txt").write_text("".join(lines))
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: ee-llm\nVersion: 0.0.0\n")
    paths = os.pathsep.join([str(installed.parent), str(ROOT)])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "HF_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_lm_eval_finds_the_model_by_its_name(tmp_path: Path) -> None:
    """And it still finds its own models: it imports them only if its registry is empty."""
    code = (
        "import lm_eval, torch\n"
        "from lm_eval.api.registry import get_model, model_registry\n"
        "print('hf' in model_registry, get_model('ee_llm').__name__)"
    )
    done = python(tmp_path, "-c", code)
    assert done.stdout == "True EarlyExitLM\n", done.stderr


def test_programs_without_lm_eval_do_not_import_it(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "print(sorted(m for m in sys.modules if m.startswith(('lm_eval', 'ee_llm'))))"
    )
    done = python(tmp_path, "-c", code)
    names = ["", ".evaluation", ".evaluation.harness", ".evaluation.harness.register", ".version"]
    assert done.stdout == f"{[f'ee_llm{name}' for name in names]}\n", done.stderr


BROKEN = "raise RuntimeError('another registry')\n"


def test_a_broken_lm_eval_does_not_break_torch(tmp_path: Path) -> None:
    """torch refuses to be imported if one of its entry points raises, whatever the reason."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("")
    (tmp_path / "lm_eval" / "models.py").write_text(BROKEN)
    done = python(tmp_path, "-c", "import lm_eval, torch; print(torch.ones(1).item())")
    assert done.stdout == "1.0\n", done.stderr
    assert "'ee_llm' cannot be added to lm_eval (RuntimeError: another registry)" in done.stderr


def test_programs_that_do_not_use_a_broken_lm_eval_hear_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text(BROKEN)
    done = python(tmp_path, "-c", "import torch; print(torch.ones(1).item())")
    assert (done.stdout, done.stderr) == ("1.0\n", "")


@pytest.mark.slow
def test_the_command_lm_eval_knows_the_model(models: Models, tasks: Path, tmp_path: Path) -> None:
    arguments = ["--model", "ee_llm", "--tasks", tasks / "choices.yaml", "--output_path", "out"]
    given = f"pretrained={models.checkpoint},dtype=float32,exit=1"
    done = python(tmp_path, "-m", "lm_eval", *arguments, "--model_args", given)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out/**/results_*.json")
    assert path.parent.name.endswith(f"__{models.checkpoint.name}"), "not the model's name"
    results = json.loads(path.read_text())
    expected = run(models.ours(exit=1), tasks)["results"]["choices"]
    assert results["results"]["choices"]["acc,none"] == expected["acc,none"]
    assert results["config"]["exits"]["loglikelihood"]["mean_depth"] == 1
    assert results["config"]["strategy"] == "exact"


@pytest.mark.slow
def test_our_command_reports_mistakes_in_one_line(
    models: Models, tasks: Path, tmp_path: Path
) -> None:
    module = "ee_llm.evaluation.harness"
    arguments = ["--model", "ee_llm", "--tasks", tasks / "choices.yaml"]
    done = python(tmp_path, "-m", module, *arguments, "--model_args", "pretrained=gone")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ee-llm: ")


@pytest.mark.slow
def test_the_task_of_the_documentation_runs(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions of reasoning-gym, which is not among the packages for development."""
    pytest.importorskip("reasoning_gym")
    page = (ROOT / "docs" / "how-to" / "lm-eval.md").read_text()
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    exec(blocks["python"], {})
    (tmp_path / "tasks" / "sums.yaml").write_text(blocks["yaml"])
    results = []
    for lm in (models.ours(), models.theirs()):
        loaded = TaskManager(include_path="tasks", include_defaults=False).load(["sums"])
        results.append(evaluate(lm, loaded, bootstrap_iters=0, limit=8, log_samples=True))
    ours, theirs = ([s["resps"] for s in one["samples"]["sums"]] for one in results)
    assert ours == theirs
    assert len(ours) == 8
