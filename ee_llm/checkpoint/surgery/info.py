"""Describes the contents of a checkpoint as JSON."""

import math
from collections import Counter
from typing import Any

from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.partition import exit_stage
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.format.quantized import is_scale
from ee_llm.checkpoint.gates import gated_exits
from ee_llm.checkpoint.integrity import Report
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.rewrite import parameter_of, specs_of
from ee_llm.errors import CheckpointError

Facts = dict[str, Any]


def describe(reader: TensorReader) -> Facts:
    """Return a description of a checkpoint, of JSON types only.

    Raises CheckpointError if a file is missing or damaged.
    """
    config, state, manifest = reader.config(), reader.state(), reader.manifest
    specs = specs_of(reader)
    model = set(reader.names())
    by_dtype = Counter({str(specs[n].dtype).removeprefix("torch."): 0 for n in sorted(model)})
    for name in model:
        by_dtype[str(specs[name].dtype).removeprefix("torch.")] += specs[name].num_bytes
    optimizer = [name for name in specs if name not in model]
    trained = {parameter_of(name) for name in optimizer}
    return {
        "path": str(reader.path),
        "ee_llm": manifest.get("ee_llm"),
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_samples * config.data.seq_length,
        "mean_of": manifest.get("mean_of", []),
        "model": config.model.model_dump(),
        "parameters": sum(
            math.prod(specs[name].shape) for name in model if not is_scale(reader, name)
        ),
        "exits": _exits(reader),
        "exits_placement": config.exits.placement,
        "tokenizer": manifest["tokenizer"],
        "tensors": len(model),
        "bytes_by_dtype": dict(by_dtype),
        "optimizer": {
            "steps": manifest["optimizer_steps"],
            "tensors": len(optimizer),
            "bytes": sum(specs[name].num_bytes for name in optimizer),
            "parameters": len(trained),
        },
        "saved_by": manifest["layout"],
        "parallel": config.parallel.model_dump(),
        "blocks_for": manifest.get("blocks"),
        "files": len(manifest["files"]),
        "bytes_on_disk": sum(manifest["files"].values()),
        "checkpoints_of_the_run": [
            path.name
            for path in directory.complete_steps(reader.path.parent)
            if reader.path.parent.name == directory.CHECKPOINTS
        ],
    }


def tensors_of(reader: TensorReader) -> list[Facts]:
    """Return the name, dtype and shape of every tensor, the optimizer's last."""
    return [
        {
            "name": name,
            "dtype": str(spec.dtype).removeprefix("torch."),
            "shape": list(spec.shape),
        }
        for name, spec in specs_of(reader).items()
    ]


def verification(report: Report) -> Facts:
    """Return the result of verifying a checkpoint, of JSON types only."""
    return {
        "ok": not report.problems,
        "files": report.num_files,
        "bytes": report.num_bytes,
        "checksums": "all files" if report.has_checksums else "tensors only",
        "problems": report.problems,
        "extra_files": report.extra,
    }


def _exits(reader: TensorReader) -> list[Facts]:
    """Return the exits from shallow to deep, the final one last."""
    config = reader.config()
    exits, last = config.exits, config.model.num_layers
    temperatures = {
        last: 1.0,
        **dict(zip(exits.boundaries, exits.temperatures, strict=True)),
    }
    gates = _gates(reader)
    return [
        {
            "boundary": boundary,
            "stage": exit_stage(config, boundary),
            "head": ["norm"] if boundary == last else list(exits.head),
            "output_weight": output_weight_name(config, boundary),
            "temperature": temperatures[boundary],
            "gate": gates.get(boundary),
            "parameters": sum(
                reader.shape(name).numel()
                for name in reader.names()
                if name.startswith(f"exits.{boundary}.") and not is_scale(reader, name)
            ),
        }
        for boundary in (*exits.boundaries, last)
    ]


def _gates(reader: TensorReader) -> dict[int, str]:
    """Return the state of each exit's gate, if it has one: "trained" or "not usable".

    A gate is not usable if it was trained for another model, or if its file is damaged.
    """
    try:
        return dict.fromkeys(gated_exits(reader), "trained")
    except CheckpointError:
        return dict.fromkeys(reader.config().exits.boundaries, "not usable")
