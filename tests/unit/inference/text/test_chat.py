"""Test `ee-llm generate --chat`: template, special tokens, end tokens, streaming, speed."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.generation import command
from ee_llm.cli.main import main
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.inference.engine import Engine
from ee_llm.inference.speed import Speed
from tests.unit.checkpoint.checkpoints import reseal
from tests.unit.data.tokenization.families import FAMILIES
from tests.unit.inference.chats import save_family
from tests.unit.inference.models import random_tensors, tiny_config

pytestmark = pytest.mark.thorough

Record = dict[str, Any]
CHATS = ("llama-2", "llama-3.1", "qwen-2.5", "smollm-2", "mistral", "deepseek", "gemma")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("qwen") / "run", "qwen-2.5")


def _generate(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> Record:
    arguments = ["generate", "--checkpoint", str(run), "--dtype", "float32", "--json", *options]
    assert main(arguments) == 0
    found: Record = json.loads(capsys.readouterr().out)
    return found


def _tokenizer(run: Path) -> Tokenizer:
    return load_tokenizer(TensorReader(run).tokenizer())


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_has_the_tokens_of_transformers_and_stops_at_all_end_tokens(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without some or all end token ids, models of these families would not stop."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    run = save_family(tmp_path / "run", name)
    ours = _tokenizer(run)
    kind = PreTrainedTokenizerFast if name == "llama-2" else AutoTokenizer
    theirs = kind.from_pretrained(tmp_path / "run-hub")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    how = ["--chat", "Hello", "--system", "Be kind."]
    found = _generate(capsys, run, *how, "--max-tokens", "1", "--ignore-eos")
    more = {"add_generation_prompt": True, "return_dict": True}
    assert found["prompt_token_ids"] == theirs.apply_chat_template(messages, **more)["input_ids"]
    assert found["messages"] == messages[1:]
    assert found["finish_reason"] == "length"
    ends = [ours.special_tokens[token] for token in FAMILIES[name].eos]
    assert found["eos_token_ids"] == ends
    assert found["sampling_params"]["ignore_eos"] is True
    for end in ends:
        config = tiny_config(vocab_size=640, max_seq_length=256)
        tensors = random_tensors(config, dtype=torch.float32)
        tensors["output.weight"] *= 0.0
        tensors["output.weight"][end] = 1.0
        one, other = tensors["output.weight"].clone(), tensors["output.weight"].clone()
        other[end] = -1.0
        tensors["output.weight"] = one
        where = tmp_path / f"end-{end}"
        ended = _generate(capsys, save_family(where, name, tensors), *how)
        if ended["token_ids"][0] != end:  # the sum of the hidden state is negative
            tensors["output.weight"] = other
            where = tmp_path / f"end-{end}-other"
            ended = _generate(capsys, save_family(where, name, tensors), *how)
        assert ended["token_ids"] == [end]
        assert (ended["finish_reason"], ended["text"]) == ("eos", "")
        assert ended["eos_token_ids"] == ends


def test_special_tokens_in_a_prompt_are_text_unless_parsed(
    qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, tokenizer = "<|im_start|>user\nHello<|im_end|>", _tokenizer(qwen)
    how = ["--prompt", text, "--max-tokens", "1"]
    spelled = _generate(capsys, qwen, *how)["prompt_token_ids"]
    parsed = _generate(capsys, qwen, *how, "--parse-special")["prompt_token_ids"]
    assert tokenizer.special_tokens["<|im_start|>"] not in spelled
    assert parsed == tokenizer.encode(text, parse_special=True) != spelled
    assert parsed[0] == tokenizer.special_tokens["<|im_start|>"]
    ids = list(map(str, parsed))
    given = _generate(capsys, qwen, "--prompt-token-ids", *ids, "--max-tokens", "1")
    assert given["prompt_token_ids"] == parsed


@pytest.mark.parametrize("bos", ["auto", "on"])
def test_the_bos_token_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bos: str
) -> None:
    run = save_family(tmp_path / "run", "llama-3.1")
    first = _tokenizer(run).bos_token_id
    text = "<|begin_of_text|>Hello"
    for how in (["--chat", "Hello"], ["--prompt", text, "--parse-special"], ["--prompt", "Hello"]):
        found = _generate(capsys, run, *how, "--bos", bos, "--max-tokens", "1")
        assert found["prompt_token_ids"].count(first) == 1
        assert found["prompt_token_ids"][0] == first


def test_stop_tokens_and_special_stop_strings(
    qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--chat", "Hello", "--max-tokens", "24", "--temperature", "1", "--ignore-eos"]
    for seed in map(str, range(20)):
        whole = _generate(capsys, qwen, *how, "--seed", seed)
        tokens, special = whole["token_ids"], _tokenizer(qwen).special_tokens
        found = [(i, text) for text, i in special.items() if i in tokens[1:]]
        if found:
            break
    id, text = found[0]
    end = tokens.index(id) + 1
    for options in (["--stop-token-ids", str(id), "639"], ["--stop", "never", text]):
        stopped = _generate(capsys, qwen, *how, "--seed", seed, *options)
        assert stopped["token_ids"] == tokens[:end]
        assert stopped["finish_reason"] == "stop"
        assert whole["text"].startswith(stopped["text"])
    assert stopped["sampling_params"]["stop"] == ["never", text]


def test_an_unknown_end_token_gives_a_warning(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer does not have the end token of the model, so that no output would end."""
    run = tmp_path / "run"
    shutil.copytree(qwen, run, symlinks=True)
    checkpoint = TensorReader(run).path
    for name in ("generation_config.json", "config.json"):
        path = checkpoint / "huggingface" / name
        if path.exists():
            settings = json.loads(path.read_text())
            path.write_text(json.dumps(settings | {"eos_token_id": None}))
    path = checkpoint / "huggingface" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|gone|>"}))
    reseal(checkpoint)
    for where, is_warned in ((qwen, False), (run, True)):
        arguments = ["generate", "--checkpoint", str(where), "--prompt", "Hi", "--dtype", "float32"]
        assert main([*arguments, "--max-tokens", "2"]) == 0
        assert ("no known end token" in capsys.readouterr().err) == is_warned


def test_a_batch_can_have_conversations_and_token_ids(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    lines = [
        {"messages": messages, "id": "chat", "system": "Be kind."},
        {"prompt_token_ids": [5, 6, 7], "id": "ids", "stop_token_ids": [1]},
        {"prompt": "<|im_end|>", "id": "special", "parse_special": True, "ignore_eos": True},
    ]
    file, output = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = ["--batch-file", str(file), "--output", str(output), "--max-tokens", "4"]
    arguments = ["generate", "--checkpoint", str(qwen), "--dtype", "float32", *how]
    assert main(arguments) == 0
    records = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    single = _generate(capsys, qwen, "--chat", "Hello", "--system", "Be kind.", "--max-tokens", "4")
    assert records["chat"]["prompt_token_ids"] == single["prompt_token_ids"]
    assert records["chat"]["token_ids"] == single["token_ids"]
    assert records["ids"]["prompt_token_ids"] == [5, 6, 7]
    assert records["ids"]["sampling_params"]["stop_token_ids"] == [1]
    assert records["ids"]["sampling_params"]["ignore_eos"] is False
    assert len(records["special"]["prompt_token_ids"]) == 1
    assert records["special"]["sampling_params"]["ignore_eos"] is True
    before = output.read_text()
    assert main(arguments) == 0  # all options are covered
    assert output.read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat", "a", "--prompt", "b"], "--prompt and --chat are both given"),
        (
            ["--chat", "a", "--prompt-token-ids", "1"],
            "--prompt-token-ids and --chat are both given",
        ),
        (["--prompt", "a", "--system", "b"], "--system applies to conversations, not to --prompt"),
        (["--system", "b"], "--system applies to conversations, not to standard input"),
        (
            ["--prompt-token-ids", "1", "--chat-template", "b"],
            "--chat-template applies to conversations, not",
        ),
        (["--prompt-token-ids", "-1"], "Token id -1"),
        (["--prompt-token-ids", "640"], "Token id 640"),
        (["--chat", "a", "--chat-template", "/no/such"], "/no/such cannot be read: No such file"),
        (["--chat-file", "/no/such"], "--chat-file /no/such cannot be read"),
    ],
)
def test_errors_are_one_line(
    qwen: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["generate", "--checkpoint", str(qwen), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_template_needs_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_family(tmp_path / "run", "gpt-2")
    assert main(["generate", "--checkpoint", str(run), "--chat", "a"]) == 2
    assert "the model has no chat template: " in capsys.readouterr().err
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    how = ["--chat", "Hello", "--chat-template", str(template), "--max-tokens", "1"]
    found = _generate(capsys, run, *how)
    tokenizer = _tokenizer(run)
    assert found["prompt_token_ids"] == [*tokenizer.encode("Hello"), tokenizer.eos_token_id]


def test_output_has_the_answer_and_its_speed(
    qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--chat", "Hello", "--max-tokens", "12", "--dtype", "float32", "--temperature", "1"]
    expected = _generate(capsys, qwen, *how)
    assert expected["text"].isprintable(), "the test needs a text that is shown as it is"
    assert len(expected["text"]) > 3
    assert main(["generate", "--checkpoint", str(qwen), *how]) == 0
    out = capsys.readouterr().out
    assert out.startswith(expected["text"])  # without the prompt, which the user wrote
    assert "tokens/s, first token after " in out
    speed = expected["speed"]
    assert set(speed) == {"time_to_first_token_s", "tokens_per_second"}
    assert min(speed.values()) > 0


def test_text_is_printed_before_the_last_token(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def advance(self: Engine, advance: Any = Engine.advance) -> None:
        lengths.append(len(sys.stdout.getvalue()))  # type: ignore[attr-defined]
        advance(self)

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(Engine, "advance", advance)
    arguments = ["generate", "--checkpoint", str(qwen), "--chat", "Hello", "--ignore-eos"]
    how = ["--max-tokens", "30", "--dtype", "float32", "--temperature", "1"]
    assert main([*arguments, *how]) == 0
    assert len(set(lengths)) > 6


def test_self_speculation_is_compared_with_full(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts of a random exit are rejected, which must give a warning about the speed."""
    how = [
        "--chat",
        "Hello",
        "--max-tokens",
        "20",
        "--strategy",
        "self-speculative",
        "--ignore-eos",
    ]
    record = _generate(capsys, qwen, *how)
    speed = record["speed"]
    assert speed["acceptance"] == record["num_accepted"] / record["num_drafted"]
    assert speed["against_full"] == pytest.approx(
        speed["tokens_per_second"] / speed["full_tokens_per_second"]
    )
    calls = []

    def slower(measured: Speed, decoder: Any, drafted: Any, batch_size: int = 1) -> Speed:
        calls.append((len(drafted), batch_size))
        return Speed(measured.time_to_first_token_s, 4.0, 0.02, 16.0)

    monkeypatch.setattr(command, "against_full", slower)
    _generate(capsys, qwen, *how[:4], "--strategy", "full")
    assert calls == []
    arguments = ["generate", "--checkpoint", str(qwen), *how]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    expected = "warning: self-speculation is slower than full depth: 4.0 tokens/s against 16.0; 2%"
    assert expected in captured.err
    assert "0.25 times its speed" in captured.out
    file, output = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "strategy": "full"}\n{"prompt": "c"}\n')
    batch = ["--batch-file", str(file), "--output", str(output), "--max-num-seqs", "2", *how[2:]]
    assert main(["generate", "--checkpoint", str(qwen), *batch]) == 0
    assert expected in capsys.readouterr().err
    assert calls == [(1, 1), (2, 2)]


def test_non_finite_logits_end_one_prompt_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only one token gives them, and other prompts of the batch continue."""
    config = tiny_config(vocab_size=640, max_seq_length=256)
    tensors = random_tensors(config, dtype=torch.float32)
    tensors["embedding.word.weight"][7] = float("nan")
    run = save_family(tmp_path / "run", "gpt-2", tensors)
    how = ["generate", "--checkpoint", str(run), "--dtype", "float32", "--max-tokens", "4"]
    assert main([*how, "--prompt-token-ids", "7", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ee-llm: --prompt-token-ids: ")
    assert "not finite" in captured.err
    file, output = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt_token_ids": [7]}\n{"prompt_token_ids": [8], "ignore_eos": true}\n')
    assert main([*how, "--batch-file", str(file), "--output", str(output)]) == 1
    good, bad = map(json.loads, output.read_text().splitlines())
    assert (good["id"], len(good["token_ids"])) == ("2", 4)
    assert bad["id"] == "1"
    assert "line 1: " in bad["error"]["message"]


def test_a_message_can_be_too_long_for_a_file_name(
    qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"{' capital' * 40}.json"
    found = _generate(capsys, qwen, "--chat", message, "--max-tokens", "1")
    assert message in found["prompt"]


def test_a_warning_without_drafts_has_no_acceptance_rate() -> None:
    speed = Speed(tokens_per_second=1.0, full_tokens_per_second=2.0)
    assert "1.0 tokens/s against 2.0. Use strategy = 'full'" in str(speed.warning())
    assert "2.0; 25% of the drafts were accepted. Use" in str(
        replace(speed, acceptance=0.25).warning()
    )
