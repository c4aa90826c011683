"""`ee-llm data prepare`: output is independent of the number of workers; errors for bad input."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ee_llm.data import prepare as module
from ee_llm.data.prepare import PrepareOptions, check_tokenizer, ordered_map, prepare
from ee_llm.data.tokenization.tokenizer import BytesTokenizer, load_tokenizer
from tests.ended import is_gone
from tests.unit.data.conftest import read_documents

pytestmark = pytest.mark.thorough


def options(inputs: Path, output: Path, **changes: object) -> PrepareOptions:
    return PrepareOptions(**{"inputs": (inputs,), "output": output, "progress": False, **changes})


def environment() -> dict[str, str]:
    """Return an environment in which a process in another folder imports this checkout."""
    root = str(Path(__file__).parents[3])
    return {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}


def test_documents_and_report(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": "zwölf"}\n', encoding="utf-8")
    report = prepare(options(path, tmp_path / "out" / "deep" / "a"))
    eos = BytesTokenizer.eos_token_id
    assert read_documents(tmp_path / "out/deep/a") == [[*b"one", eos], [*"zwölf".encode(), eos]]
    assert report == (str(tmp_path / "out/deep/a"), 2, 11, 9, 1, ())
    assert "2 documents (1 empty ones skipped), 11 tokens, 0.82 bytes/token" in str(report)
    assert sorted(os.listdir(tmp_path / "out/deep")) == ["a.bin", "a.idx", "a.meta.json"]
    prepare(options(path, tmp_path / "b", append_eos=False))
    assert read_documents(tmp_path / "b") == [[*b"one"], [*"zwölf".encode()]]


def test_preparing_again_does_not_read_prepared_data(tmp_path: Path):
    """With the output in the input folder, the second run used to read .bin and .idx as texts."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / ".other.bin.123.part").write_bytes(b"abc")  # left by a killed run
    output = tmp_path / "corpus"
    first = prepare(options(tmp_path, output))
    before = [Path(f"{output}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".meta.json")]
    report = prepare(options(tmp_path, output))
    assert (report.num_documents, report.num_tokens) == (first.num_documents, 5)
    after = [Path(f"{output}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".meta.json")]
    assert after == before
    assert "skipped: 4 prepared data" in str(report)
    assert "1 broken link" in str(report)
    with pytest.raises(ValueError, match=r"corpus\.bin: prepared data"):
        prepare(options(Path(f"{output}.bin"), tmp_path / "b"))


def test_progress_of_compressed_files_reaches_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "some text"}\n' * 50_000))
    advanced = []
    monkeypatch.setattr(
        module.Progress, "update", lambda self, task, advance: advanced.append(advance)
    )
    prepare(options(path, tmp_path / "a", workers=1))
    assert sum(advanced) == path.stat().st_size
    assert len(advanced) > 1


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_output_does_not_depend_on_workers(
    tmp_path: Path,
    sentencepiece_model: Path,
    huggingface_json: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """Real processes finish many chunks of lines and of files in any order."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 5_000)
    tokenizer = {"sentencepiece": sentencepiece_model, "huggingface": huggingface_json}[kind]
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(300):  # Very different lengths, so that chunks take different times.
        lines.append(json.dumps({"text": f"document {i} " + "item " * int(rng.integers(1, 400))}))
    (inputs / "lines.jsonl").write_text("\n".join(lines))
    (inputs / "file.txt").write_text("a plain file\n" * 1000)
    for workers in (1, 2, 3):
        changes = {"workers": workers, "tokenizer": str(tokenizer)}
        report = prepare(options(inputs, tmp_path / f"out{workers}", **changes))
        assert report.num_documents == 301
    for suffix in (".bin", ".idx", ".meta.json"):
        first, *others = [(tmp_path / f"out{n}{suffix}").read_bytes() for n in (1, 2, 3)]
        assert all(other == first for other in others)
    some = load_tokenizer(tokenizer)
    documents = read_documents(tmp_path / "out3")
    for i in (0, 1, 150, 300):  # file.txt precedes lines.jsonl.
        text = "a plain file\n" * 1000 if i == 0 else json.loads(lines[i - 1])["text"]
        *ids, last = documents[i]
        assert some.decode(ids) == text
        assert last == some.eos_token_id


def test_error_in_a_worker_is_raised(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 5 + "{}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 6: no key 'text'"):
        prepare(options(path, tmp_path / "out", workers=2))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_killed_worker_is_an_error_with_a_remedy():
    """When a machine that runs out of memory kills a worker, there is no endless wait."""
    with pytest.raises(RuntimeError, match="one of 2 worker processes was killed.*--workers"):
        list(ordered_map(os._exit, [1] * 20, 2))


@contextlib.contextmanager
def slow_workers(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Yield a process that calls `ordered_map` and the ids of its two busy workers; kill all."""
    code = (
        "import os, signal, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import slow\n"
        "from ee_llm.data.prepare import ordered_map\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "list(ordered_map(slow.work, [sys.argv[1]] * 20, 2))\n"
    )
    (folder / "slow.py").write_text(
        "import os, time\n"
        "def work(folder):\n"
        "    open(os.path.join(folder, f'worker-{os.getpid()}'), 'w').close()\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(paths := list(folder.glob("worker-*"))) < 2:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, [int(path.name.partition("-")[2]) for path in paths]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_second_ctrl_c_ends_all_workers_immediately(tmp_path: Path):
    """The terminal also sends it to the workers, which may be processing a long document."""
    with slow_workers(tmp_path) as (process, workers):
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.1)
        _, err = process.communicate(timeout=30)
        assert "SpawnProcess" not in err  # No traceback of a worker.
        assert all(map(is_gone, workers))
    assert process.returncode in (1, -signal.SIGINT)


def test_workers_end_with_their_parent(tmp_path: Path):
    with slow_workers(tmp_path) as (process, workers):
        process.kill()
        process.communicate(timeout=30)
        assert all(map(is_gone, workers))


def test_items_are_not_read_far_ahead():
    """The texts of a large corpus must not all be in memory while they wait for a worker."""
    num_taken = 0

    def items() -> Iterator[int]:
        nonlocal num_taken
        for i in range(1_000):
            num_taken += 1
            yield i

    results = ordered_map(abs, items(), 2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert num_taken < 30
    results.close()


def test_unchanged_after_a_failure(tmp_path: Path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("good")
    bad.write_bytes(b"b\xe4d")
    prepare(options(good, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"bad\.txt: not UTF-8 text, byte 0xe4 at offset 1"):
        prepare(options(bad, tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_disk_that_is_full_at_the_end_keeps_the_existing_data(tmp_path: Path):
    """A limit on the file size simulates a full disk.

    Index and description fit; the tokens do not, but are buffered until the end. Removing old files
    as soon as some of the new ones are written would lose both.
    """
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "new.txt").write_text("new " * 500)
    prepare(options(tmp_path / "old.txt", tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = (
        "import resource, sys; from ee_llm.cli import main\n"
        "from ee_llm.data import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "sys.exit(main.main(['data', 'prepare', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, "--inputs", "new.txt", "--output", "out"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment()
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ee-llm: [Errno 27] File too large: 'out.bin'\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", ["\n\n", '{"text": ""}\n'])
def test_no_document(tmp_path: Path, content: str):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"inputs .*a\.jsonl have no document with text"):
        prepare(options(path, tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_no_such_input(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        prepare(options(tmp_path / "nowhere", tmp_path / "out"))


def test_unwritable_output(tmp_path: Path):
    """Even root cannot create a path below a file; the error precedes reading any text."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.txt/out\.bin cannot be written: .*is not a folder"):
        prepare(options(path, path / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_directory_without_permission(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"cannot be written: Permission denied"):
        prepare(options(path, locked / "out"))


@pytest.mark.parametrize("workers", [-1, 1025, 2**64])
def test_numbers_of_workers(tmp_path: Path, workers: int):
    with pytest.raises(ValueError, match=f"--workers {workers} must be"):
        prepare(options(tmp_path, tmp_path / "out", workers=workers))


def test_data_of_another_tokenizer(tmp_path: Path, sentencepiece_model: Path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    prepare(options(path, tmp_path / "out", tokenizer=str(sentencepiece_model)))
    check_tokenizer(tmp_path / "out", load_tokenizer(sentencepiece_model))
    with pytest.raises(ValueError, match=r"prepared with tokenizer sha256:.*but data\.tokenizer"):
        check_tokenizer(tmp_path / "out", BytesTokenizer())
    (tmp_path / "out.meta.json").unlink()
    check_tokenizer(tmp_path / "out", BytesTokenizer())


def test_data_with_another_eos(tmp_path: Path, huggingface_json: Path):
    """Another version may have ended documents with another token of the same tokenizer."""
    path = tmp_path / "a.txt"
    path.write_text("some text")
    prepare(options(path, tmp_path / "out", tokenizer=str(huggingface_json)))
    check_tokenizer(tmp_path / "out", load_tokenizer(huggingface_json))
    description = json.loads((tmp_path / "out.meta.json").read_text())
    (tmp_path / "out.meta.json").write_text(json.dumps({**description, "eos_token_id": 2}))
    with pytest.raises(ValueError, match="prepared with end-of-document token 2.* has 1"):
        check_tokenizer(tmp_path / "out", load_tokenizer(huggingface_json))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_invalid_description(tmp_path: Path, content: bytes):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    prepare(options(path, tmp_path / "out"))
    (tmp_path / "out.meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.meta\.json is not a description"):
        check_tokenizer(tmp_path / "out", BytesTokenizer())


def test_description_of_other_data(tmp_path: Path):
    """If another tool overwrites the data, the remaining description does not match them."""
    for name, text in (("a", "some text"), ("b", "other text")):
        (tmp_path / f"{name}.txt").write_text(text)
        prepare(options(tmp_path / f"{name}.txt", tmp_path / name))
    os.replace(tmp_path / "a.meta.json", tmp_path / "b.meta.json")
    with pytest.raises(ValueError, match=r"b\.meta\.json does not describe"):
        check_tokenizer(tmp_path / "b", BytesTokenizer())


def test_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bar counts bytes of the input and is complete at the end."""
    bars = []
    progress = module._progress
    monkeypatch.setattr(module, "_progress", lambda shown: bars.append(progress(shown)) or bars[-1])
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n')
    prepare(options(path, tmp_path / "out"))
    (task,) = bars[0].tasks
    assert task.completed == task.total == path.stat().st_size


def test_tool(tmp_path: Path):
    """tools/preprocess_data.py runs, and an error is one line without a traceback."""
    tool = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
    path = tmp_path / "a.txt"
    path.write_text("some text")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tool), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    done = run("--inputs", path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 documents, 10 tokens, 0.90 bytes/token" in done.stdout
    assert read_documents(tmp_path / "out") == [[*b"some text", 256]]
    failed = run("--inputs", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert failed.returncode == 2
    assert failed.stderr.startswith("ee-llm: input")
    assert "Traceback" not in failed.stderr
