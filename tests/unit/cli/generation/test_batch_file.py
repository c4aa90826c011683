"""Test the output file of a batch: appended, finished, retried and refused records."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ee_llm.cli.generation import batch_file
from ee_llm.cli.generation.batch_file import append, open_output
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.text.records import as_json, error_record, origin, to_record

POLICY = make_exit_policy((2,), (0.5,))
IDS = ("a", "b", "c")
REQUESTS = {id: Request(id, (index, 2), POLICY, SamplingParams()) for index, id in enumerate(IDS)}
ORIGINS = {id: origin(f"prompt {id}", one, "float32", "x", "0f") for id, one in REQUESTS.items()}


def _record(id: str, /, **changes: Any) -> dict[str, Any]:
    request = REQUESTS[id]
    made = RequestOutput(
        request_id=id,
        prompt_token_ids=request.prompt_token_ids,
        token_ids=(5,),
        exits=(2,),
        confidences=(0.9,),
        logprobs=(-0.1,),
        finish_reason="length",
        policy=POLICY,
        sampling_params=SamplingParams(),
        strategy="exact",
        num_layers=4,
        text="new",
    )
    return to_record(ORIGINS[id], made, id=id) | changes


def _with_params(**changes: Any) -> dict[str, Any]:
    return _record("a")["sampling_params"] | changes


def _line(id: str, /, **changes: Any) -> bytes:
    return as_json(_record(id, **changes)).encode() + b"\n"


def _reopened(path: Path, before: bytes) -> tuple[set[str], bytes]:
    """Return the ids that count as finished in a file, and its content after it is reopened."""
    path.write_bytes(before)
    with open_output(path, ORIGINS) as (_, done):
        pass
    return done, path.read_bytes()


def test_appended_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.jsonl"
    with open_output(path, ORIGINS) as (file, done):
        assert done == set()
        append(file, _record("b"))
        assert path.read_bytes() == _line("b")  # immediately
    with open_output(path, ORIGINS) as (file, done):
        assert done == {"b"}
        append(file, _record("a"))
    assert path.read_bytes() == _line("b") + _line("a")


@pytest.mark.thorough
def test_a_truncated_record_is_generated_again(tmp_path: Path) -> None:
    whole, cut = _line("a"), _line("b")
    for length in range(len(cut) - 1):
        assert _reopened(tmp_path / "out", whole + cut[:length]) == ({"a"}, whole)
        assert _reopened(tmp_path / "out", cut[:length]) == (set(), b"")


def test_a_record_without_a_line_end_is_generated_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(_line("a") + _line("b")[:-1])
    with open_output(path, ORIGINS) as (file, done):
        append(file, _record("c"))
    assert done == {"a"}
    assert path.read_bytes() == _line("a") + _line("c")


def test_records_of_other_prompts_are_kept(tmp_path: Path) -> None:
    other = _line("c", id="elsewhere")
    assert _reopened(tmp_path / "out", other + _line("a")) == (
        {"elsewhere", "a"},
        other + _line("a"),
    )


def test_error_records_are_removed(tmp_path: Path) -> None:
    """Failed prompts are retried, so that each id has one record in the end."""
    errors = [as_json(error_record(id, "why")).encode() + b"\n" for id in ("b", "c")]
    for after in (errors[0], errors[0] + errors[1], errors[0] + errors[1][:9], errors[0][:-1]):
        assert _reopened(tmp_path / "out", _line("a") + after) == ({"a"}, _line("a"))
    assert _reopened(tmp_path / "out", errors[0]) == (set(), b"")


FOREIGN = [
    _line("a") + as_json(error_record("b", "why")).encode() + b"\n" + _line("c"),
    b"my only notes",
    b"my only notes\n",
    b"notes, and more notes\nof which the last line does not end",
    b"\x89PNG\r\n\x1a\n\x00\x00",
    b'{"id": "a", "prompt": "a batch file, not its output"}',
    b'{"id": "a", "prompt": "a batch file, not its output"}\n',
    b'{\n  "id": "a"\n}',
    b'{"prompt": "b"}\n',
    _line("a") + b"\n" + b"notes\n",
    _line("a") + b'{"notes": "a lin',
    _line("a", token_ids=[]),
    _line("a", id=1),
    _line("a", id=None),
    _line("a", id=["a"]),
    _line("a") + _line("b") + _line("a"),
]


@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: repr(content[:40]))
def test_a_file_with_other_content_is_refused_and_unchanged(tmp_path: Path, content: bytes) -> None:
    """Truncating the last line first would destroy a file that was given by mistake."""
    path = tmp_path / "out"
    with pytest.raises(ValueError, match=r"--output .*out, line \d"):
        _reopened(path, content)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"prompt": "another"}, "prompt"),
        ({"prompt_token_ids": [7]}, "prompt_token_ids"),
        ({"sampling_params": _with_params(seed=1)}, "sampling_params.seed"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"checkpoint": "y"}, "checkpoint"),
        ({"sampling_params": _with_params(max_tokens=3)}, "sampling_params.max_tokens"),
        ({"sampling_params": _with_params(stop=["x"])}, "sampling_params.stop"),
        ({"eos_token_ids": [7]}, "eos_token_ids"),
        ({"strategy": "propagate"}, "strategy"),
    ],
)
def test_a_record_of_another_origin_is_refused(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    """Ids are often line numbers, so an edited batch must not count as finished."""
    content = _line("b") + _line("a", **changes)
    with pytest.raises(ValueError, match=f"line 2: id 'a' was generated with another '{name}'"):
        _reopened(tmp_path / "out", content)
    assert (tmp_path / "out").read_bytes() == content


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ee_llm.inference.text.json_lines.MAX_LINE", 2000)
    with pytest.raises(ValueError, match="line 2 is longer than"):
        _reopened(tmp_path / "out", _line("a") + b'{"id": "' + b"x" * 3000)


@pytest.mark.thorough
def test_a_file_locked_by_another_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path\n"
        "from ee_llm.cli.generation.batch_file import open_output\n"
        "with open_output(Path(sys.argv[1]), {}): pass"
    )
    command = [sys.executable, "-c", code, str(path)]
    with open_output(path, {}):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stderr.splitlines()[-1].startswith(
            f"ee_llm.errors.UserError: --output {path} is being written by another process"
        )
    subprocess.run(command, check=True, timeout=60)


def test_the_error_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"--output {path} cannot be written"):
            open_output(path, {}).__enter__()


def test_append_syncs_the_record_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(batch_file.os, "fsync", synced.append)
    with open_output(tmp_path / "out", {}) as (file, _):
        append(file, _record("a"))
        assert synced == [file.fileno()]
