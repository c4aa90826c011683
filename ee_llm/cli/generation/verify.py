"""`ee-llm verify`: check a file of generations, and print divergences with their margins."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.generation.options import VerifyOptions
from ee_llm.errors import UserError
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.text.json_lines import opened, read_objects
from ee_llm.inference.text.records import from_record, is_error
from ee_llm.inference.verification.verify import VerificationReport, Verifier


def verify(options: VerifyOptions) -> None:
    """Check a file of generations, and print divergences with their margins.

    Raises:
        UserError: A line is not a generation, or rounding does not explain a divergence.
    """
    outputs = read_outputs(options.file, str(options.file))
    report = Verifier(TensorReader(options.checkpoint)).verify(outputs)
    if report.num_generations == 0:
        raise UserError(f"{options.file} contains no generation.")
    if options.json:
        print(json.dumps(report.to_dict()))
    print_report(report)


def read_outputs(
    path: Path, source: str, ids: Collection[str] | None = None
) -> Iterator[tuple[RequestOutput, torch.dtype]]:
    """Yield the generations in a file, each with its dtype; error records are skipped.

    Args:
        path: The file.
        source: Its name in errors.
        ids: Only the generations with these ids; None for all.

    Raises:
        UserError: A line is neither a generation nor an error record.
    """
    with opened(path, source) as file:
        for where, record in read_objects(file, source):
            if is_error(record) or (ids is not None and record.get("id") not in ids):
                continue
            output, dtype = from_record({**record, "id": where}, where)
            yield output, distributed.DTYPES[dtype]


def print_report(report: VerificationReport) -> None:
    """Print the divergences and the result to standard error.

    Raises:
        UserError: Rounding does not explain all divergences.
    """
    if report.findings:
        distributed.console.print(_table(report))
    distributed.console.print(str(report), soft_wrap=True)
    if not report.passed:
        raise UserError(
            f"{report.num_unexplained} tokens or exits differ from those that the model, the policy"
            " and the seed define. Check that this checkpoint generated them."
        )


def _table(report: VerificationReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("generation", "token", "kind", "found", "expected", "margin", ""):
        is_text = name in ("generation", "")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for finding in report.findings:
        one = finding.divergence
        remark = Text("rounding") if finding.is_explained else Text("beyond rounding", "red")
        cells = (one.index, one.kind, one.found, one.expected, f"{one.margin:.2e}")
        table.add_row(Text(finding.request_id), *map(str, cells), remark)
    return table
