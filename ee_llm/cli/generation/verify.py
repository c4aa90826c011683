"""`ee-llm verify`: finished generations against what defines them, and margins of divergences."""

import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.architecture.tensors import Converted
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import CheckpointTensors
from ee_llm.cli.generation.options import VerifyOptions
from ee_llm.errors import UserError
from ee_llm.inference.text.json_lines import opened, read_objects
from ee_llm.inference.text.records import from_record, is_error
from ee_llm.inference.verification.certificate import Divergence, tolerance, verify_trace
from ee_llm.inference.verification.reference_decoding import RequestOutput


@dataclass(frozen=True)
class Finding:
    """A divergence, and whether the rounding of the dtype explains it."""

    divergence: Divergence
    is_explained: bool


class Checker:
    """A model as it was served: weights rounded to a dtype, but computed with in float64."""

    def __init__(self, reader: TensorReader, dtype: torch.dtype) -> None:
        tensors = Converted(CheckpointTensors(reader), dtype, "cpu")
        self._model = ReferenceModel(reader.config(), tensors, torch.float64, distributed.device())
        self._tolerance = tolerance(dtype)

    def check(self, generation: RequestOutput) -> tuple[int, list[Finding]]:
        """Return the number of new tokens, and the divergences of a generation."""
        found = verify_trace(self._model, generation)
        findings = [Finding(one, self._tolerance.explains(one)) for one in found]
        return len(generation.tokens), findings


@dataclass
class Account:
    """What was found in some generations."""

    num_generations: int = 0
    num_tokens: int = 0
    findings: list[tuple[str, Finding]] = field(default_factory=list)

    @property
    def num_unexplained(self) -> int:
        """Return the number of divergences that rounding does not explain."""
        return sum(not finding.is_explained for _, finding in self.findings)

    def add(self, where: str, checked: tuple[int, list[Finding]]) -> None:
        """Take in what `Checker.check` said about the generation at a place."""
        num_tokens, findings = checked
        self.num_generations += 1
        self.num_tokens += num_tokens
        self.findings += [(where, finding) for finding in findings]

    def tell(self) -> None:
        """Print the divergences and the verdict to standard error.

        Raises UserError if rounding does not explain all of them.
        """
        if self.findings:
            distributed.console.print(self.table())
        distributed.console.print(
            f"certificate: {self.num_generations} generations, {self.num_tokens} tokens,"
            f" {len(self.findings)} divergences, {self.num_unexplained} of them beyond rounding",
            soft_wrap=True,
        )
        if self.num_unexplained:
            raise UserError(
                f"{self.num_unexplained} tokens or exits are not what the model, the policy and the"
                " seed define; is this the checkpoint that made them?"
            )

    def table(self) -> Table:
        """Return a table of all divergences."""
        table = Table(box=None, pad_edge=False)
        for name in ("generation", "token", "kind", "found", "expected", "margin", ""):
            is_text = name in ("generation", "")
            table.add_column(name, justify="left" if is_text else "right", overflow="fold")
        for where, finding in self.findings:
            one = finding.divergence
            remark = Text("rounding") if finding.is_explained else Text("beyond rounding", "red")
            cells = (one.index, one.kind, one.found, one.expected, f"{one.margin:.2e}")
            table.add_row(Text(where), *map(str, cells), remark)
        return table


def verify(options: VerifyOptions) -> None:
    """Check a file of generations and print any divergence with its margin.

    Raises UserError if a line is no generation, or if rounding does not explain a divergence.
    """
    account = check_file(TensorReader(options.checkpoint), options.file, str(options.file))
    if account.num_generations == 0:
        raise UserError(f"{options.file} holds no generation")
    if options.json:
        print(json.dumps(_as_record(account)))
    account.tell()


def check_file(
    reader: TensorReader, path: Path, source: str, ids: Collection[str] | None = None
) -> Account:
    """Return what is found in a file's generations, or in those of the given ids alone.

    source: what the file is called in errors. Error records are passed over. Raises UserError if
    another line is no generation.
    """
    account = Account()
    checkers: dict[str, Checker] = {}
    with opened(path, source) as file:
        for where, record in read_objects(file, source):
            if is_error(record) or (ids is not None and record.get("id") not in ids):
                continue
            generation, dtype = from_record(record, where)
            if dtype not in checkers:
                checkers[dtype] = Checker(reader, distributed.DTYPES[dtype])
            try:
                account.add(where, checkers[dtype].check(generation))
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
    return account


def _as_record(account: Account) -> dict[str, object]:
    return {
        "num_generations": account.num_generations,
        "num_tokens": account.num_tokens,
        "divergences": [
            {"generation": where, **_divergence(one.divergence), "is_explained": one.is_explained}
            for where, one in account.findings
        ],
    }


def _divergence(divergence: Divergence) -> dict[str, object]:
    margin = divergence.margin if math.isfinite(divergence.margin) else None  # JSON has no infinity
    return asdict(divergence) | {"margin": margin}
