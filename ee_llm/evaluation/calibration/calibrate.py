"""Calibrate the exits of a checkpoint on held-out text."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ee_llm import distributed
from ee_llm.checkpoint.gates import write_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import stated_bos
from ee_llm.config import Config
from ee_llm.data.tokenization.tokenizer import Tokenizer
from ee_llm.evaluation.calibration.collector import Calibration
from ee_llm.evaluation.calibration.gate_training import GateTraining, TrainedGate, gates_of
from ee_llm.evaluation.calibration.options import CalibrateOptions, check_calibration
from ee_llm.evaluation.calibration.result import CalibrationResult
from ee_llm.evaluation.calibration.task import TaskWindows
from ee_llm.evaluation.options import check_exits_exist
from ee_llm.evaluation.text_pass import TextPass, run_command, run_pass
from ee_llm.inference.load import policy_fingerprint


def calibrate(options: CalibrateOptions) -> CalibrationResult:
    """Return thresholds for the exits, and the risk that they keep.

    With tensor x pipeline > 1 and without a launcher, this starts that many ranks on this machine.

    Args:
        options: The options.

    Raises:
        UserError: The options, the text or the checkpoint is not valid, or the text is too short.
        RunError: The loss of an exit is not finite, or a rank failed or was lost.
    """
    check_calibration(options)
    gates: list[TrainedGate] = []
    if options.train_gate:
        trained = run_pass(
            replace(options, num_tokens=options.gate_tokens),
            "training gates",
            lambda config: _gate_training(config, options),
        )
        if trained is None:
            return CalibrationResult.from_dict(run_command("calibrate", options))
        gates = gates_of(trained.found)
    tensors = {name: tensor for gate in gates for name, tensor in gate.tensors.items()}
    done = run_pass(
        options,
        "calibrating",
        lambda config: Calibration(config, options),
        options.measure_used,
        options.gate_tokens if options.train_gate else 0,
        tensors if options.train_gate else None,
        _task_windows(options) if options.task else None,
    )
    if done is None:
        return CalibrationResult.from_dict(run_command("calibrate", options))
    if gates and distributed.is_rank_zero():
        write_gates(done.reader, tensors)
    return CalibrationResult.from_dict(_facts(options, done, gates, tensors))


def _gate_training(config: Config, options: CalibrateOptions) -> GateTraining:
    check_exits_exist(config, options.checkpoint, "calibrate")
    return GateTraining(config, options.seed)


def _task_windows(options: CalibrateOptions) -> Any:
    def make(reader: TensorReader, tokenizer: Tokenizer, seq_length: int) -> TaskWindows:
        adds_bos = stated_bos(reader.path)
        return TaskWindows(options.task, tokenizer, adds_bos, seq_length, options.num_tokens)

    return make


def _facts(
    options: CalibrateOptions,
    done: TextPass,
    gates: list[TrainedGate],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return the fields of the result."""
    [found] = done.found
    measure, config = options.measure_used, done.reader.config()
    return found | {
        "checkpoint": str(done.reader.path),
        "fingerprint": policy_fingerprint(done.reader, measure, tensors if gates else None),
        "boundaries": config.exits.boundaries,
        "num_layers": config.model.num_layers,
        "inputs": done.inputs or tuple(map(str, options.task)),
        "text_digest": done.digest,
        "seq_length": done.seq_length,
        "dtype": done.dtype,
        "measure": measure,
        "metric": options.metric,
        "risk": options.risk,
        "delta": options.delta,
        "gates": tuple(
            {"boundary": gate.boundary, "agreement": gate.agreement, "auc": gate.auc}
            for gate in gates
        ),
    }
