"""Test reading prompts from an option, a file, standard input and a batch file."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from ee_llm.cli.generation import prompts
from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.cli.generation.prompts import InvalidLine, Prompt, read_prompts

RUN = Path("run")


def _batch(tmp_path: Path, *lines: object, **options: object) -> list[Prompt | InvalidLine]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return read_prompts(GenerateOptions(RUN, batch_file=file, **options))


def _stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_prompt_keeps_its_last_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("é\r\n\n".encode())
    for source in ({"prompt": "é\r\n\n"}, {"prompt_file": file}, {}, {"prompt_file": Path("-")}):
        _stdin(monkeypatch, "é\r\n\n".encode())
        (prompt,) = read_prompts(GenerateOptions(RUN, **source))
        assert prompt.text == "é\r\n\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ""}, "--prompt is empty"),
        ({"prompt": "\udcff"}, "--prompt is not UTF-8"),
        ({}, "standard input is not UTF-8 at byte 1"),
        ({"prompt_file": Path("-")}, "standard input is not UTF-8"),
        ({"prompt_file": Path("/no/such")}, "--prompt-file /no/such can.*read"),
        ({"prompt_file": Path("/dev/zero")}, "--prompt-file /dev/zero is larger than 16 MiB"),
        ({"prompt_file": Path("/dev/null")}, "--prompt-file /dev/null is empty"),
    ],
)
def test_the_error_names_an_invalid_prompt(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], message: str
) -> None:
    _stdin(monkeypatch, b"a\xff")
    with pytest.raises(ValueError, match=message):
        read_prompts(GenerateOptions(RUN, **given))


def test_a_missing_prompt_at_a_terminal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _stdin(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="no prompt. Give --prompt"):
        read_prompts(GenerateOptions(RUN))


def test_a_line_can_set_its_id_and_options(tmp_path: Path) -> None:
    own = {
        "thresholds": [0.5, "off"],
        "measure": "margin",
        "strategy": "self-speculative",
        "draft_exit": 2,
        "draft_length": 3,
        "draft_threshold": None,
        "max_tokens": 7,
        "min_tokens": 2,
        "stop": ["x", "y"],
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "parse_special": True,
        "system": "Be kind.",
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "seed": 8,
        "logprobs": 3,
        "bos": "on",
    }
    first, second, third = _batch(
        tmp_path,
        {"prompt": "a", "id": "x", **own},
        "",
        {"prompt": "b", "id": 17, "thresholds": "off", "stop": "z"},
        {"prompt": "c"},
        seed=5,
        draft_threshold=0.25,
    )
    assert (first.text, second.text, third.text) == ("a", "b", "c")
    assert [one.id for one in (first, second, third)] == ["x", "17", "3"]
    for name, value in own.items():
        assert getattr(first.options, name) == (tuple(value) if type(value) is list else value)
    assert second.options.thresholds == ("off",)
    assert second.options.stop == ("z",)
    assert (second.options.seed, second.options.draft_threshold) == (5, 0.25)
    assert third.options.thresholds == (0.8,)
    assert third.where.endswith("prompts.jsonl, line 4")


def test_a_line_can_set_the_options_of_sled_and_dola(tmp_path: Path) -> None:
    sled = {
        "strategy": "sled",
        "sled_rate": 2.5,
        "sled_scale": 20,
        "sled_tau": 0.5,
        "sled_layers": [0, 2],
        "sled_variant": "released",
        "early_head": "raw",
    }
    dola = {"strategy": "dola", "dola_layers": [1], "dola_alpha": 0.2, "early_head": "final"}
    prompts = _batch(tmp_path, {"prompt": "a", **sled}, {"prompt": "b", **dola})
    for prompt, own in zip(prompts, (sled, dola), strict=True):
        for name, value in own.items():
            assert getattr(prompt.options, name) == (tuple(value) if type(value) is list else value)


def test_the_exit_policy_of_a_line_replaces_that_of_the_command(tmp_path: Path) -> None:
    """The line has a policy file, or it has thresholds and the command has a policy file."""
    plain, file, thresholds, measure = _batch(
        tmp_path,
        {"prompt": "a"},
        {"prompt": "a", "policy": "own.json"},
        {"prompt": "a", "thresholds": 0.5},
        {"prompt": "a", "measure": "margin"},
        policy=Path("all.json"),
    )
    assert [one.options.policy for one in (plain, file, thresholds, measure)] == [
        Path("all.json"),
        Path("own.json"),
        None,
        None,
    ]
    assert thresholds.options.thresholds == (0.5,)
    assert measure.options.measure == "margin"


def test_every_option_that_affects_the_text_can_be_set_on_a_line() -> None:
    """A line cannot set paths, the execution of the engine, or the display of results."""
    of_all = {
        "checkpoint", "prompt", "prompt_file", "batch_file", "output", "dtype",
        "max_num_seqs", "cache_tokens", "deferral", "tensor", "pipeline", "timeout_s", "verify",
        "show_confidence", "json", "attention", "cuda_graphs", "compile", "quantize",
        "prompt_token_ids", "chat", "chat_file", "chat_template",
    }  # fmt: skip
    assert set(prompts._Line.model_fields) - set(prompts.KINDS) == (
        set(GenerateOptions.__dataclass_fields__) - of_all
    )
    assert "prompt_token_ids" in prompts.KINDS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "is not valid JSON"),
        ("[1]", "is \\[1\\]"),
        ({"prompt": "a", "id": True}, '"id" is True'),
        ({"prompt": "a", "id": 1.5}, '"id" is 1.5'),
        ({"prompt": "a", "id": "\ud800"}, '"id" is '),
        ({"prompt": "a", "id": "1"}, "id '1' is .* --batch-file .*prompts.jsonl, line 1"),
    ],
)
def test_a_line_that_is_not_an_object_or_has_no_unique_id_ends_the_batch(
    tmp_path: Path, line: object, message: str
) -> None:
    """Its error record would have no id."""
    with pytest.raises(ValueError, match=f"prompts.jsonl, line 2:? {message}"):
        _batch(tmp_path, {"prompt": "a"}, line, {"prompt": "b"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "x"}, ".* has no prompt. Give one of prompt, messages, prompt_token_ids"),
        ({"prompt": "a", "messages": []}, ".* has prompt and messages. Give one of"),
        ({"messages": []}, r"a conversation is \[\]. It must be a list of messages"),
        ({"messages": [{"content": "a"}]}, 'message 1: "role" is None'),
        ({"messages": [{"role": "user"}]}, 'message 1: "content" is None'),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 'message 1: "content" is '),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'message 1: a part of "content" is .*image_url',
        ),
        ({"prompt_token_ids": [1, "2"]}, r"'prompt_token_ids' is \[1, '2'\]"),
        ({"prompt_token_ids": []}, r"\"prompt_token_ids\" is \[\]"),
        ({"prompt": "a", "stop_token_ids": [True]}, r"'stop_token_ids' is \[True\]"),
        ({"prompt": "a", "ignore_eos": 1}, "'ignore_eos' is 1"),
        ({"prompt": ""}, "\"prompt\" is ''"),
        ({"prompt": ["a"]}, r"'prompt' is \['a'\]"),
        ({"prompt": "\ud800"}, r"\"prompt\" is '\\ud800'"),
        ({"promt": "a"}, r"'promt' is unknown. Did you mean 'prompt'\?"),
        (
            {"prompt": "a", "temprature": 1},
            r"'temprature' is unknown. Did you mean 'temperature'\?",
        ),
        (
            {"prompt": "a", "xyz": 1},
            "'xyz' is unknown. Use one of prompt, messages, .*temperature",
        ),
        ({"prompt": "a", "output": "/etc/passwd"}, "'output' is unknown"),
        ({"prompt": "a", "checkpoint": "x"}, "'checkpoint' is unknown"),
        ({"prompt": "a", "seed": "1"}, "'seed' is '1'"),
        ({"prompt": "a", "seed": True}, "'seed' is True"),
        ({"prompt": "a", "seed": None}, "'seed' is None"),
        ({"prompt": "a", "max_tokens": 2.0}, "'max_tokens' is 2.0"),
        ({"prompt": "a", "temperature": "hot"}, "'temperature' is 'hot'"),
        ({"prompt": "a", "temperature": 10**400}, "'temperature' is 1000"),
        ({"prompt": "a", "thresholds": [0.5, None]}, r"'thresholds' is \[0.5, None\]"),
        ({"prompt": "a", "thresholds": {}}, "'thresholds' is {}"),
        ({"prompt": "a", "stop": [1]}, r"'stop' is \[1\]"),
        ({"prompt": "a", "measure": ["entropy"]}, r"'measure' is \['entropy'\]"),
        ({"prompt": "a", "strategy": "fast"}, "'strategy' is 'fast'"),
        ({"prompt": "a", "draft_exit": "2"}, "'draft_exit' is '2'"),
        ({"prompt": "a", "system": 1}, "'system' is 1"),
        (
            {"messages": [{"role": "user", "content": "a"}], "system": "\ud800"},
            r"\"system\" is '\\ud800'",
        ),
        ({"prompt": "a", "policy": "p.json", "thresholds": 0.5}, ".* policy and thresholds"),
        ({"prompt": "a", "policy": "p.json", "measure": "margin"}, ".* policy and measure"),
    ],
)
def test_an_invalid_line_has_an_error_and_the_others_are_read(
    tmp_path: Path, line: dict[str, object], message: str
) -> None:
    first, invalid, last = _batch(tmp_path, {"prompt": "a"}, line, {"prompt": "b"})
    assert isinstance(invalid, InvalidLine)
    assert invalid.id == line.get("id", "2")
    assert re.search(f"prompts.jsonl, line 2: {message}", invalid.error)
    assert (first.id, last.id) == ("1", "3")
    assert isinstance(first, Prompt)
    assert isinstance(last, Prompt)


def test_an_error_shows_only_the_beginning_of_a_value(tmp_path: Path) -> None:
    (invalid,) = _batch(tmp_path, {"prompt": "a", "seed": "9" * 10_000})
    assert isinstance(invalid, InvalidLine)
    assert "'seed' is '999" in invalid.error
    assert len(invalid.error) < 400


def test_an_empty_or_too_large_batch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="prompts.jsonl is empty"):
        _batch(tmp_path, "")
    monkeypatch.setattr(prompts, "MAX_BATCH", 20)
    with pytest.raises(ValueError, match="larger than .* MiB"):
        _batch(tmp_path, {"prompt": "a"}, {"prompt": "b"})


MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]


@pytest.mark.parametrize("content", [MESSAGES, {"messages": MESSAGES}])
@pytest.mark.parametrize("how", ["chat", "chat_file", "standard input"])
def test_a_conversation_can_be_read_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, how: str
) -> None:
    file = tmp_path / "conversation.json"
    file.write_text(json.dumps(content, indent=2))
    _stdin(monkeypatch, file.read_bytes())
    given: dict[str, object] = {
        "chat": {"chat": str(file)},
        "chat_file": {"chat_file": file},
        "standard input": {"chat_file": Path("-")},
    }[how]
    (prompt,) = read_prompts(GenerateOptions(RUN, **given))
    assert prompt.messages == (MESSAGES[0], {"role": "user", "content": "a\nb"})


def test_a_message_is_a_conversation() -> None:
    (prompt,) = read_prompts(GenerateOptions(RUN, chat="Hello.json"))
    assert prompt.messages == ({"role": "user", "content": "Hello.json"},)
    with pytest.raises(ValueError, match="--chat is empty"):
        read_prompts(GenerateOptions(RUN, chat=""))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "conversation.json is not valid JSON"),
        ("[]", "a conversation is \\[\\]"),
        ('"x"', "a conversation is 'x'"),
        ('{"messages": 1}', "a conversation is 1"),
        ('{"model": "x", "messages": []}', "'model' is unknown"),
        ('[{"role": "user", "content": 1}]', 'message 1: "content" is 1'),
        ('[{"role": "user", "role": "x"}]', "has the key 'role' twice"),
    ],
)
def test_the_error_names_an_invalid_conversation(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "conversation.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(GenerateOptions(RUN, chat_file=file))


def test_a_line_continues_a_text_a_conversation_or_token_ids(tmp_path: Path) -> None:
    text, chat, ids = _batch(
        tmp_path, {"prompt": "a"}, {"messages": MESSAGES}, {"prompt_token_ids": [3, 1]}
    )
    assert (text.text, text.messages, text.token_ids) == ("a", (), ())
    assert (chat.text, len(chat.messages), chat.token_ids) == ("", 2, ())
    assert (ids.text, ids.messages, ids.token_ids) == ("", (), (3, 1))
