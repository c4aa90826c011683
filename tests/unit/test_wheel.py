"""Test the content of the wheel, and that it works without a checkout."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import ee_llm
from tests.unit.inference.models import random_tensors, save_model, tiny_config

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout without files of earlier builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "ee_llm", source / "ee_llm", ignore=ignored)
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    # The build needs setuptools, which the tests require; nothing is downloaded.
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, folder=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """Return the bin folder of an environment with the wheel and this environment's libraries."""
    folder = wheel.parent / "environment"
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--target", packages, wheel, folder=wheel.parent)
    # Paths from .pth files of this environment come last, without the checkout.
    libraries = [*site.getsitepackages(), *sys.path]
    found = [path for path in dict.fromkeys(libraries) if path.endswith("-packages")]
    (packages / "libraries.pth").write_text("\n".join(found) + "\n")
    # pip installs scripts for the interpreter that runs it.
    program = folder / "bin" / "ee-llm"
    shutil.copy(packages / "bin" / "ee-llm", program)
    text = program.read_text().partition("\n")[2]
    program.write_text(f"#!{folder}/bin/python\n{text}")
    return folder / "bin"


def test_the_wheel_has_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ee_llm").rglob("*.py")}
    assert modules - names == set()
    packaged = {name for name in names if ".dist-info/" not in name}
    page = ROOT / "ee_llm" / "serving" / "page"
    served = {str(path.relative_to(ROOT)) for path in page.iterdir() if path.is_file()} - modules
    assert packaged - modules == {"ee_llm/py.typed"} | served
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    assert metadata.startswith(f"ee_llm-{ee_llm.__version__}.dist-info")


def test_the_command_line_works_without_the_checkout(environment: Path, tmp_path: Path) -> None:
    done = run(environment / "ee-llm", "--version", folder=tmp_path)
    assert done.stdout == f"ee-llm {ee_llm.__version__}\n"
    assert "ee-llm COMMAND" in run(environment / "ee-llm", "--help", folder=tmp_path).stdout
    python = environment / "python"
    done = run(python, "-m", "ee_llm", "init", "--shape", "llama-tiny", folder=tmp_path)
    done = run(environment / "ee-llm", "plan", "--config", "train.toml", folder=tmp_path)
    assert "2 ranks" in done.stdout


def test_the_package_can_be_imported_without_the_checkout(
    environment: Path, tmp_path: Path
) -> None:
    code = "import ee_llm, ee_llm.errors; print(ee_llm.__file__, ee_llm.errors.UserError)"
    done = run(environment / "python", "-c", code, folder=tmp_path)
    assert done.stdout.startswith(str(environment.parent))
    code = "import ee_llm.inference.engine, ee_llm.training.trainer, sys; print(len(sys.path))"
    run(environment / "python", "-c", code, folder=tmp_path)


def test_a_model_generates_without_the_checkout(environment: Path, tmp_path: Path) -> None:
    """Also on two pipeline stages: the other rank is started from the wheel too."""
    config = tiny_config(vocab_size=264)
    save_model(tmp_path / "run", config, random_tensors(config, dtype=torch.float32))
    code = """
        import ee_llm
        params = ee_llm.SamplingParams(max_tokens=4, ignore_eos=True)
        if __name__ == "__main__":
            for pipeline in (1, 2):
                with ee_llm.LLM("run", dtype="float32", pipeline=pipeline) as llm:
                    (output,) = llm.generate(["a prompt"], params, exits=0.5)
                    assert llm.verify(output).passed
                print(*output.token_ids)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    one, two = run(environment / "python", "program.py", folder=tmp_path).stdout.splitlines()
    assert len(one.split()) == 4
    assert one == two
