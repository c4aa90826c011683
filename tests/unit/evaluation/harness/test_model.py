"""Requests that lm_eval makes: blank and long ones, chat templates, statistics and ranks."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from ee_llm.config import Config
from ee_llm.errors import DataError, RequestError
from ee_llm.evaluation.harness.model import EarlyExitLM
from ee_llm.evaluation.harness.scoring_pass import Window
from tests.unit.evaluation.models import make_config, save

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[4]
MAX_LENGTH = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the byte tokenizer, which has no beginning-of-sequence token."""
    config: Config = make_config(max_seq_length=MAX_LENGTH, output="own", temperatures=(0.3, 0.4))
    return save(tmp_path_factory.mktemp("model") / "run", config)


def make_lm(checkpoint: Path, **arguments: Any) -> EarlyExitLM:
    return EarlyExitLM(**{"pretrained": checkpoint, "dtype": "float64", **arguments})


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def likelihoods(lm: EarlyExitLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)


def generated(lm: EarlyExitLM, *prompts: str, **generation: Any) -> list[str]:
    requests = instances("generate_until", *((prompt, generation) for prompt in prompts))
    return lm.generate_until(requests, disable_tqdm=True)


def test_a_blank_context_is_refused(checkpoint: Path) -> None:
    """It has no tokens, and its first token was scored with the logits of the request before."""
    lm = make_lm(checkpoint)
    with pytest.raises(RequestError, match=r"request \(' ', 'x'\): the context has no tokens") as e:
        likelihoods(lm, ("The quick", " fox"), (" ", "x"))
    assert "add_bos_token=True" in str(e.value)
    with pytest.raises(RequestError, match=r"request \('Hi', ''\): the continuation has 0 tokens"):
        likelihoods(lm, ("Hi", ""))


def test_a_window_cannot_score_more_rows_than_it_has() -> None:
    with pytest.raises(AssertionError, match="the rows of another window"):
        Window((5,), ((5, 6),))


def test_truncation_is_said_once_per_call_and_counted(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_lm(checkpoint)
    fits, long = "a" * (MAX_LENGTH - 1), "a" * 80
    with caplog.at_level(logging.WARNING, "ee_llm"):
        likelihoods(lm, (fits, " b"), ("short", " b"))
        assert not caplog.records, "the last token is no input"
        likelihoods(lm, (long, " b"), (long, " c"), (fits, " d"))
        generated(lm, long, "b", max_gen_toks=4)
        likelihoods(lm, (long, " b"))
    expected = ["2 of 3 loglikelihood", "1 of 2 generate_until", "1 of 1 loglikelihood"]
    assert [r.message.partition(" requests do not fit")[0] for r in caplog.records] == expected
    info = lm.get_model_info()
    assert info["num_truncated"] == {"loglikelihood": 3, "generate_until": 1}


def test_every_choice_counts_in_the_depth(checkpoint: Path) -> None:
    """Choices that differ in their last token share a pass, which was counted once."""
    lm = make_lm(checkpoint, exit=1)
    likelihoods(lm, ("The quick", " fox"), ("The quick", " fog"), ("The quick", " a"))
    exits = lm.get_model_info()["exits"]["loglikelihood"]
    assert exits == {"num_tokens": 10, "mean_depth": 1, "share_by_exit": {"1": 1}}


def test_the_model_has_two_names(checkpoint: Path) -> None:
    """lm_eval names folders after `pretrained`."""
    assert EarlyExitLM(checkpoint=checkpoint).options == EarlyExitLM(pretrained=checkpoint).options


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_cached_requests_are_those_of_the_template(checkpoint: Path, tmp_path: Path) -> None:
    """lm_eval stores rendered prompts under the name of the tokenizer."""
    plain, other = write(tmp_path / "a.jinja", PLAIN), write(tmp_path / "b.jinja", PLAIN + " ")
    names = [
        make_lm(checkpoint, **given).tokenizer_name
        for given in ({}, {"chat_template": plain}, {"chat_template": other})
    ]
    assert len(set(names)) == 3
    assert make_lm(checkpoint, chat_template=plain).tokenizer_name == names[1]
    lm = make_lm(checkpoint, chat_template=plain)
    lm._text.template.variables["bos_token"] = "<s>"
    assert lm.tokenizer_name not in names, "templates write special tokens"
    assert all(name.isalnum() for name in names), "it becomes part of a file name"


def test_system_messages_are_left_out_if_the_template_rejects_them(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in lm_eval's Hugging Face adapter."""
    lm = make_lm(checkpoint, chat_template=write(tmp_path / "strict.jinja", STRICT))
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    with caplog.at_level(logging.WARNING, "ee_llm"):
        assert lm.apply_chat_template([system, user]) == "user: Hi\nassistant:"
    assert [r.message for r in caplog.records] == [
        "The chat template rejects the system message, so it is left out."
    ]
    with pytest.raises(DataError, match="no system"):
        lm.apply_chat_template([system])


def test_a_template_cannot_be_selected_by_name(checkpoint: Path, tmp_path: Path) -> None:
    lm = make_lm(checkpoint, chat_template=write(tmp_path / "a.jinja", PLAIN))
    assert lm.chat_template(True) == PLAIN
    assert lm.chat_template(False) is None
    with pytest.raises(RequestError, match="--apply_chat_template tool_use: templates cannot be"):
        lm.chat_template("tool_use")


ON_RANKS = """
import json, sys
from tests.unit.evaluation.harness.test_model import generated, make_lm
lm = make_lm(sys.argv[1], pipeline=2, **json.loads(sys.argv[2]))
print(json.dumps(generated(lm, *json.loads(sys.argv[3]), max_gen_toks=8)))
lm.close()
"""


@pytest.mark.slow
def test_generation_does_not_depend_on_the_ranks(checkpoint: Path) -> None:
    """In a new process, because several ranks need process groups."""
    given, prompts = {"threshold": 0.5, "max_num_seqs": 2}, ("The quick", "brown fox", "é then")
    lm = make_lm(checkpoint, **given)
    expected = generated(lm, *prompts, max_gen_toks=8)
    assert len(lm.get_model_info()["exits"]["generate_until"]["share_by_exit"]) > 1
    arguments = [str(checkpoint), json.dumps(given), json.dumps(prompts)]
    done = subprocess.run(
        [sys.executable, "-c", ON_RANKS, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
