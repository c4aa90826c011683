"""Chat templates: the same output as transformers, and limits on what they can do."""

from pathlib import Path
from typing import Any

import pytest

from ee_llm.data.tokenization import chat_template
from ee_llm.data.tokenization.chat_template import ChatTemplate
from ee_llm.errors import DataError
from tests.unit.data.tokenization.families import write_family

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "a <b> & 'c' \N{SNOWMAN}\n", "name": None},
    {"role": "assistant", "content": "d", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "user", "content": "e"},
]

# Each uses a feature that a plain jinja2 environment lacks or implements differently.
TEMPLATES = {
    "blocks are trimmed": "x\n  {% if true %}\n    {{ messages[0].role }}\n  {% endif %}\n  y\n",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}|{{ messages[1] | tojson(indent=2, sort_keys=true) }}",
    "null keys are missing": "{{ 'name' in messages[0] }}{{ messages[0].name is defined }}",
    "the time": "{{ strftime_now('%Y') | length }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "missing names": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}"
    "{{ nothing is defined }}{{ nothing }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}",
    "namespaces": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1).a }}",
    "no escapes": "{{ messages[0].content }}{{ '<&>' }}",
}
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_rendering_as_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(write_family("gpt-2", tmp_path))
    expected = reference.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(TEMPLATES[name], "here", SPECIAL).render(MESSAGES) == expected
    assert len(expected) > 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "here: .*roles must alternate.*chat_template",
        ),
        ("{{ messages[0].content.__class__.__mro__ }}", "here: .*unsafe"),
        ("{{ messages.append(1) }}", "here: .*unsafe"),
        ("{{ messages[9].content }}", "here: .*no element 9"),
        ("{{ 1 / 0 }}", "here: .*division by zero"),
        ("{% include '/etc/passwd' %}", "here: .*no loader"),
        ("{{ raise_exception('no.') }}", r"conversation: no\. Change"),
        (r"{{ '\ud800' }}", "here: .*unpaired surrogate"),
    ],
)
def test_failing_template_gives_a_one_line_error(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, "here").render(MESSAGES)


INVALID_TEMPLATES = ("{% if %}", "{% for m in messages %}", "{{ x", "(" * 9 + "{{", "{% break %}")


@pytest.mark.parametrize("source", INVALID_TEMPLATES)
def test_invalid_template_is_named(source: str) -> None:
    with pytest.raises(ValueError, match="here: the chat template is not valid"):
        ChatTemplate(source, "here")


def test_sizes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="here: the chat template is larger than 1 MiB"):
        ChatTemplate("x" * (2**20 + 1), "here")
    monkeypatch.setattr(chat_template, "_MAX_TEXT", 1000)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    with pytest.raises(
        ValueError, match="here: the chat template renders this conversation to more than"
    ):
        ChatTemplate(endless, "here").render(MESSAGES)


@pytest.mark.parametrize(("content", "end"), [("Rome ", "Rome "), ("Rome", "Rome")])
def test_the_last_message_can_be_continued(content: str, end: str) -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    messages = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": content}]
    found = ChatTemplate(source, "here").render(messages, continues_last=True)
    assert found == f"<user>Rome?</><assistant>{end}"
    stripping = ChatTemplate(source.replace("m.content", "m.content | trim"), "here")
    assert stripping.render(messages, continues_last=True) == found.rstrip()


def test_a_template_without_the_last_message_cannot_continue_it() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "here")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="here: the chat template omits the last message"):
        template.render(messages, continues_last=True)
