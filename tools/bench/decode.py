"""Measure decoding with exits, compared with exits off, transformers and the ideal.

    python tools/bench/decode.py --json decode.json [--quick]

The default model is the quick start's. All sides decode the same prompts in turn. See
docs/reference/benchmarks.md for the method, and for how to read the tables.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ee_llm import distributed
from ee_llm.inference.verification.certificate import tolerance
from tools.bench import report
from tools.bench.decode_costs import measure_costs
from tools.bench.decode_quality import Certificate, common_prefix
from tools.bench.decode_rows import (
    FULL,
    Row,
    Sample,
    control_cells,
    latency_cells,
    make_figures,
    make_rows,
    speed_cells,
)
from tools.bench.decode_setup import STRATEGIES, Bench, Options, prepare, sides

QUICK = {"batches": (1, 16), "new_tokens": 32, "rounds": 3}
# The minimum number of sequences of each side and batch size whose quality is evaluated.
NUM_EVALUATED = 8


def measure(
    bench: Bench, batch: int, on_step: Callable[[str], None]
) -> tuple[list[Row], list[Certificate]]:
    """Return the rows of a batch size and the certificates of our strategies."""
    options = bench.options
    on_step(f"batch {batch}: costs")
    context = options.prompt_tokens + options.new_tokens // 2
    costs = measure_costs(bench.engine, bench.policy, batch, context, 2 * options.rounds)
    wanted = sides(bench, batch)
    names = list(wanted)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(-1, options.rounds):
        shift = number % len(names)  # no side always runs after the same other side
        for name in names[shift:] + names[:shift]:
            on_step(f"batch {batch}: {name}")
            sample = wanted[name](number)
            if number >= 0:  # the first round allocates, and collects exit statistics
                samples[name].append(sample)
    on_step(f"batch {batch}: certificate")
    rows = make_rows(batch, samples, costs, bench.model.config.model.num_layers)
    return add_quality(bench, rows, samples)


def add_quality(
    bench: Bench, rows: Sequence[Row], samples: Mapping[str, Sequence[Sample]]
) -> tuple[list[Row], list[Certificate]]:
    """Add the quality of the last rounds' outputs to the rows; return rows and certificates."""
    evaluated, certificates = [], []
    for row in rows:
        count = -(-NUM_EVALUATED // row.batch)  # number of rounds
        own, full = samples[row.side][-count:], samples[FULL][-count:]
        texts = [text for one in own for text in zip(one.prompts, one.tokens, strict=True)]
        by_dense = [tokens for one in full for tokens in one.tokens]
        agreeing = [bench.dense.agreement(*text) for text in texts]
        prefixes = [common_prefix(t, dense) for (_, t), dense in zip(texts, by_dense, strict=True)]
        row = replace(
            row,
            agreement=sum(agreeing) / len(texts),
            common_prefix=sum(prefixes) / len(texts),
        )
        if row.side in STRATEGIES:
            made = [one for sample in own if sample.trace for one in sample.trace.generations]
            found = bench.dense.certify(made, tolerance(bench.dtype))
            certificates.append(found)
            row = replace(
                row,
                divergence_rate=found.num_divergent / found.num_tokens,
                largest_token_margin=found.largest_token,
                largest_exit_margin=found.largest_exit,
                certificate_pass_rate=found.num_passed / found.num_generations,
            )
        evaluated.append(row)
    return evaluated, certificates


def show(bench: Bench, rows: Sequence[Row]) -> None:
    """Print the tables."""
    options, limits = bench.options, tolerance(bench.dtype)
    policy = zip(bench.policy.boundaries, bench.policy.thresholds, strict=True)
    exits = ", ".join(f"exit {b} {'off' if t is None else f'{t:g}'}" for b, t in policy)
    dtype = str(bench.dtype).removeprefix("torch.")
    title = f"decoding {options.new_tokens} tokens after {options.prompt_tokens}, {dtype}"
    if not distributed.has_cuda():
        title += f", {torch.get_num_threads()} threads"
    report.print_table(f"{title}; thresholds: {exits}", [speed_cells(row) for row in rows])
    title = f"latency and agreement; tolerated margins: {limits.token:.2g} / {limits.exit:.2g}"
    report.print_table(title, [latency_cells(row) for row in rows])
    title = "controls: agreement with the dense model at the same depth"
    report.print_table(title, [control_cells(control) for control in bench.controls])


def pipeline_figures(bench: Bench) -> dict[str, float]:
    """Run decode_pipeline.py with the same thresholds and return its figures."""
    options = bench.options
    if not options.pipeline or options.shape is not None or distributed.has_cuda():
        return {}
    given: dict[str, object] = {
        "--checkpoint": options.checkpoint,
        "--dtype": str(bench.dtype).removeprefix("torch."),
        "--prompt-tokens": options.prompt_tokens,
        "--new-tokens": options.new_tokens,
        "--rounds": options.rounds,
    }
    arguments = [str(word) for pair in given.items() for word in pair]
    thresholds = ["off" if t is None else str(t) for t in bench.policy.thresholds]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        tool = [sys.executable, str(Path(__file__).with_name("decode_pipeline.py"))]
        subprocess.run(
            [*tool, *arguments, "--thresholds", *thresholds, "--json", str(path)], check=True
        )
        figures: dict[str, float] = json.loads(path.read_text())["figures"]
    return figures


def main(options: Options) -> None:
    """Measure, print the tables and write the figures."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with distributed.console.status("model, thresholds, controls"):
        bench = prepare(options)
    num_sides = [len(sides(bench, batch)) for batch in options.batches]
    rows: list[Row] = []
    certificates: list[Certificate] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=distributed.console,
        transient=True,
        disable=not distributed.console.is_terminal,
    ) as progress:
        total = sum(2 + (options.rounds + 1) * count for count in num_sides)
        task = progress.add_task("", total=total)

        def on_step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        for batch in options.batches:
            found, proofs = measure(bench, batch, on_step)
            rows += found
            certificates += proofs
    show(bench, rows)
    figures = make_figures(rows, certificates) | pipeline_figures(bench)
    records = [row.record() for row in rows] + [vars(control) for control in bench.controls]
    report.write_json(options.json, records, figures)


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except ValueError as error:
        sys.exit(f"decode: {error}")
