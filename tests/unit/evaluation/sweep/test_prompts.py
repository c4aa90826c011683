"""Prompts of a sweep: the tokens that the model sees."""

import json
from pathlib import Path
from typing import Any

import pytest

from ee_llm.checkpoint.read import TensorReader
from ee_llm.errors import DataError
from ee_llm.evaluation.sweep.options import SweepOptions
from ee_llm.evaluation.sweep.prompts import find_prompts
from ee_llm.inference.llm import LLM
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from tests.unit.inference.chats import save_family

pytestmark = pytest.mark.thorough

MESSAGES = [{"role": "user", "content": "Hello there"}]
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("llama") / "run", "llama-2")


def prompts_of(run: Path, given: tuple[object, ...] = (), **options: Any) -> list[EncodedPrompt]:
    reader = TensorReader(run)
    return find_prompts(SweepOptions(run, **options), reader, reader.config(), given)


def test_prompts_are_those_of_generate(run: Path, tmp_path: Path) -> None:
    """Texts begin with the beginning-of-sequence token; token ids are used as they are."""
    path = tmp_path / "prompts.jsonl"
    lines = ({"prompt": "Hello"}, {"messages": MESSAGES}, {"prompt_token_ids": [5, 6]})
    path.write_text("\n".join(map(json.dumps, lines)))
    found = prompts_of(run, prompts=path)
    with LLM(run, dtype="float32") as llm:
        expected = [llm.encoder.encode_text("Hello"), llm.encoder.encode_chat(MESSAGES)]
        assert found == [*expected, llm.encoder.encode_ids([5, 6])]
        assert found == prompts_of(run, ("Hello", MESSAGES, (5, 6)))
        bos = llm.tokenizer.bos_token_id
    assert found[0].token_ids[0] == bos


def test_prompts_of_texts_begin_as_others_do(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    found = prompts_of(run, text=(tmp_path / "a.txt",), prompt_length=6, num_prompts=3)
    bos = prompts_of(run, ("Hello",))[0].token_ids[0]
    assert [len(prompt.token_ids) for prompt in found] == [7, 7, 7]
    assert [prompt.token_ids.count(bos) for prompt in found] == [1, 1, 1]
    assert {prompt.token_ids[0] for prompt in found} == {bos}


def test_chat_template_can_be_given(tmp_path: Path) -> None:
    run = save_family(tmp_path / "run", "gpt-2")
    with pytest.raises(DataError, match="has no chat template"):
        prompts_of(run, (MESSAGES,))
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    (found,) = prompts_of(run, (MESSAGES,), chat_template=template)
    assert found.text == "<Hello there>"
