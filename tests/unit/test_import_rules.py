"""Test the import rules between the packages of ee_llm on their syntax trees."""

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ee_llm"


class Rule(NamedTuple):
    """The imports that are allowed in `where`. Dotted names include all modules below them."""

    where: str
    ours: tuple[str, ...] | None = None  # other ee_llm packages allowed; None: all
    never: tuple[str, ...] = ()  # forbidden modules of any package
    standard_only: bool = False  # no third-party modules
    through: bool = False  # whether `never` also covers indirect imports
    excluded: tuple[str, ...] = ()  # packages that the rule does not apply to


RULES = (
    Rule("errors", ours=(), standard_only=True),
    Rule("atomic_file", ours=("errors",), standard_only=True),
    Rule("output_files", ours=("errors",), standard_only=True),
    Rule("config", ours=("errors",), never=("torch", "megatron"), through=True),
    Rule("distributed", ours=("errors",)),
    Rule("architecture", ours=("config", "errors")),
    Rule("losses", ours=("errors",)),
    Rule("launch.rank", ours=("errors",), never=("torch",), through=True),
    Rule("launch", ours=("distributed", "errors")),
    Rule("data", ours=("config", "distributed", "atomic_file", "errors")),
    Rule(
        "checkpoint",
        ours=(
            "config",
            "distributed",
            "architecture",
            "data",
            "atomic_file",
            "errors",
            "version",
        ),
    ),
    Rule("checkpoint.read", never=("megatron",), through=True),
    Rule("checkpoint.write", never=("megatron",), through=True),
    Rule("checkpoint.surgery", never=("megatron",), through=True),
    Rule("model", ours=("config", "distributed", "architecture", "losses", "errors")),
    Rule("pipeline.plan", ours=("errors",), standard_only=True),
    Rule("pipeline.lower", ours=("errors",), standard_only=True),
    Rule("pipeline.simulate", ours=("errors",), standard_only=True),
    Rule("pipeline.schedules", ours=("errors",), standard_only=True),
    Rule("pipeline", ours=("config", "architecture", "distributed", "atomic_file", "errors")),
    Rule(
        "training",
        ours=(
            "config",
            "distributed",
            "architecture",
            "losses",
            "data",
            "checkpoint",
            "model",
            "pipeline",
            "launch",
            "atomic_file",
            "errors",
        ),
    ),
    Rule(
        "conversion",
        ours=(
            "config",
            "distributed",
            "architecture",
            "data",
            "checkpoint",
            "atomic_file",
            "errors",
        ),
    ),
    Rule("conversion", never=("megatron",), through=True),
    Rule(
        "inference",
        ours=(
            "config",
            "distributed",
            "architecture",
            "data",
            "checkpoint",
            "launch",
            "atomic_file",
            "errors",
        ),
    ),
    Rule("inference", never=("megatron",), through=True),
    Rule("inference.request", never=("torch",), through=True),
    Rule("inference.scheduling", never=("torch",), through=True),
    Rule(
        "evaluation",
        ours=(
            "config",
            "distributed",
            "architecture",
            "data",
            "checkpoint",
            "inference",
            "launch",
            "output_files",
            "errors",
        ),
    ),
    Rule("evaluation", never=("megatron",), through=True),
    Rule("", never=("ee_llm.evaluation",), excluded=("evaluation", "api", "cli", "__init__")),
    Rule("serving", ours=("config", "distributed", "data", "inference", "errors", "version")),
    Rule("serving", never=("megatron",), through=True),
    Rule("", never=("ee_llm.serving",), excluded=("serving", "cli", "__init__")),
    Rule("api", never=("ee_llm.cli",)),
    Rule("", never=("ee_llm.cli",), excluded=("cli", "launch", "__main__")),
    Rule(
        "", never=("megatron",), excluded=("distributed", "model", "checkpoint", "training", "data")
    ),
    Rule("", never=("deepspeed",), excluded=("distributed",)),
)

# The only package that names devices.
DEVICE_WORDS = ("cuda", "nccl", "gloo")
DEVICE_PACKAGE = "distributed"

MAX_FILES = 14  # Python files in one folder
MAX_LINES = 400  # of one file


class Import(NamedTuple):
    """One imported name, and whether importing the module already imports it."""

    name: str
    line: int
    at_once: bool


def package_sources() -> dict[str, str]:
    """Return the source of each module of ee_llm by dotted name; packages end in `.__init__`."""
    return {
        ".".join(("ee_llm", *path.relative_to(PACKAGE).with_suffix("").parts)): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@functools.cache
def imports(module: str, source: str) -> tuple[Import, ...]:
    """Return every import of a module except those for type checkers, which are not executed."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_once)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from a import b` may import the module a.b. If b is no module, no rule matches a.b.
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", node.lineno, at_once)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield Import(str(argument.value), node.lineno, at_once)
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from visit(child, at_once and not in_function)

    return tuple(visit(ast.parse(source), True))


def imported_modules(module: str, sources: Mapping[str, str]) -> dict[str, str]:
    """Return every module that `module` imports directly or indirectly, with its importer."""
    found: dict[str, str] = {}
    queue = [module]
    seen = set()
    while queue:
        current = queue.pop()
        if current in seen or current not in sources:
            continue
        seen.add(current)
        # Importing a module first imports the packages that contain it.
        parts = current.split(".")
        queue += [".".join([*parts[:n], "__init__"]) for n in range(1, len(parts))]
        for name, _, at_once in imports(current, sources[current]):
            if at_once:
                found.setdefault(name, current)
                queue += [name, f"{name}.__init__", name.rpartition(".")[0]]
                queue.append(f"{name.rpartition('.')[0]}.__init__")
    return found


def broken_imports(sources: Mapping[str, str]) -> list[str]:
    """Return one line for each import that breaks a rule."""
    lines = []
    for module, source in sources.items():
        for rule in RULES:
            where = f"ee_llm.{rule.where}" if rule.where else "ee_llm"
            package = module.split(".")[1]
            if not within(module, where) or package in rule.excluded:
                continue
            for name, line, _ in imports(module, source):
                place = f"{module}:{line} imports {name}"
                if within(name, *rule.never):
                    lines.append(f"{place}: never in {where}")
                elif within(name, "ee_llm"):
                    theirs = [*name.split("."), ""][1]
                    if rule.ours is not None and theirs not in (package, *rule.ours):
                        lines.append(f"{place}: {where} may import of ee_llm only {rule.ours}")
                elif rule.standard_only and name.split(".")[0] not in sys.stdlib_module_names:
                    lines.append(f"{place}: {where} has the standard library only")
            if rule.through:
                for name, importer in imported_modules(module, sources).items():
                    if within(name, *rule.never) and importer != module:
                        lines.append(f"{module} imports {name} through {importer}")
    return lines


def import_cycles(sources: Mapping[str, str]) -> list[str]:
    """Return one line for each cycle of imports, including those for type checkers."""
    edges: dict[str, set[str]] = {}
    for module, source in sources.items():
        found = edges.setdefault(module, set())
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for alias in node.names:
                names = (f"{node.module}.{alias.name}", node.module)
                places = [place for name in names for place in (name, f"{name}.__init__")]
                target = next((place for place in places if place in sources), module)
                if target != module:
                    found.add(target)
    lines, done, path = [], set(), []

    def visit(module: str) -> None:
        if module in path:
            lines.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module in done:
            return
        path.append(module)
        for target in sorted(edges[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in sorted(edges):
        visit(module)
    return lines


def device_words(sources: Mapping[str, str]) -> list[str]:
    """Return one line for each device name in the code of other packages than `distributed`."""
    lines = []
    for module, source in sources.items():
        if within(module, f"ee_llm.{DEVICE_PACKAGE}"):
            continue
        for node in ast.walk(ast.parse(source)):
            word = ""
            if isinstance(node, ast.Attribute):
                word = node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                word = node.value.partition(":")[0]
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names]
                dotted = ".".join([getattr(node, "module", None) or "", *names])
                word = next((part for part in dotted.split(".") if part in DEVICE_WORDS), "")
            if word in DEVICE_WORDS:
                lines.append(f"{module}:{getattr(node, 'lineno', 0)} names {word}")
    return lines


def test_the_package_follows_the_import_rules() -> None:
    assert broken_imports(package_sources()) == []


def test_only_the_distributed_package_names_devices() -> None:
    assert device_words(package_sources()) == []


def test_there_are_no_import_cycles() -> None:
    assert import_cycles(package_sources()) == []


def test_a_planted_import_cycle_is_found() -> None:
    sources = {
        "ee_llm.a": "from ee_llm import b",
        "ee_llm.b": "def f():\n    from ee_llm.c import g",
        "ee_llm.c": "if TYPE_CHECKING:\n    from ee_llm.a import f",
    }
    assert import_cycles(sources) == ["ee_llm.a -> ee_llm.b -> ee_llm.c -> ee_llm.a"]
    assert import_cycles(sources | {"ee_llm.b": "import os"}) == []


def test_folders_and_files_stay_small() -> None:
    folders = Counter(path.parent for path in PACKAGE.rglob("*.py"))
    assert {str(folder): count for folder, count in folders.items() if count > MAX_FILES} == {}
    sizes = {str(path): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: size for path, size in sizes.items() if size > MAX_LINES} == {}


def test_no_module_is_named_utils() -> None:
    """Such modules collect unrelated functions."""
    assert not [name for name in package_sources() if {"utils", "util"} & set(name.split("."))]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ee_llm.config.sections", "import torch"),
        ("ee_llm.config.sections", "from ee_llm import platform"),
        ("ee_llm.distributed.grid", "from ee_llm.config import Config"),
        ("ee_llm.model.stage", "def build():\n    from ee_llm.training import run"),
        ("ee_llm.model.stage", "from ..pipeline.runtime import Runtime"),
        ("ee_llm.losses.exit_losses", "import megatron.core.tensor_parallel as tp"),
        ("ee_llm.pipeline.plan", "import numpy"),
        ("ee_llm.pipeline.lower", "from ee_llm.config import Config"),
        ("ee_llm.pipeline.simulate", "import rich.table"),
        ("ee_llm.cli.main", "import megatron.core"),
        ("ee_llm.some.new.package", "import megatron"),
        ("ee_llm.pipeline.runtime", "import ee_llm.model.stage"),
        ("ee_llm.inference.engine", "from ee_llm.training.run import train"),
        ("ee_llm.inference.engine", "import importlib\nimportlib.import_module('megatron.core')"),
        ("ee_llm.inference.scheduling.scheduler", "if True:\n    from torch import Tensor"),
        ("ee_llm.inference.request", "import torch"),
        ("ee_llm.inference.scheduling.block_manager", "import torch"),
        ("ee_llm.inference.scheduling.prefix_cache", "from torch import Tensor"),
        ("ee_llm.inference.scheduling.deferral", "import torch.nn"),
        ("ee_llm.inference.scheduling.pipeline_scheduler", "def plan():\n    import torch"),
        ("ee_llm.training.run", "from ee_llm import inference"),
        ("ee_llm.evaluation.sweep", "from ee_llm.training.trainer import train"),
        ("ee_llm.inference.llm", "from ee_llm.evaluation.result import EvaluationResult"),
        ("ee_llm.evaluation.measure", "import megatron.core"),
        ("ee_llm.serving.api", "from ee_llm.model import build"),
        ("ee_llm.training.zero.model", "from deepspeed.runtime import engine"),
        ("ee_llm.training.run", "from ee_llm.cli.main import main"),
    ],
)
def test_a_planted_import_is_found(module: str, source: str) -> None:
    assert broken_imports({module: "import os\n"}) == []
    assert len(broken_imports({module: source})) >= 1


def test_a_planted_indirect_import_is_found() -> None:
    """Importing the reader would import megatron-core if its package did."""
    sources = {
        "ee_llm.checkpoint.__init__": "from ee_llm.checkpoint.sharded.save import save",
        "ee_llm.checkpoint.sharded.save": "import megatron.core",
        "ee_llm.checkpoint.read": "import torch",
    }
    assert broken_imports(sources) == [
        "ee_llm.checkpoint.read imports megatron.core through ee_llm.checkpoint.sharded.save"
    ]
    sources["ee_llm.checkpoint.sharded.save"] = "def save():\n    import megatron.core"
    assert broken_imports(sources) == []


def test_scheduling_can_be_imported_without_torch() -> None:
    """This also finds imports that the rules above miss."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ee_llm.inference import request\n"
        "from ee_llm.inference.scheduling import block_manager, prefix_cache, deferral\n"
        "from ee_llm.inference.scheduling import scheduler, pipeline_scheduler"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_imports_for_type_checkers_are_allowed() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"
    assert broken_imports({"ee_llm.inference.scheduling.scheduler": source}) == []


@pytest.mark.parametrize(
    "source", ["x.cuda()", "d = 'cuda:0'", "init(backend='nccl')", "from torch import cuda"]
)
def test_a_planted_device_is_found(source: str) -> None:
    assert len(device_words({"ee_llm.model.stage": source})) == 1
    assert device_words({"ee_llm.distributed.devices": source}) == []
