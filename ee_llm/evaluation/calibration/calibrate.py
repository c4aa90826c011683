"""Calibrate the exits of a checkpoint on held-out text."""

from ee_llm.evaluation.calibration.collector import Calibration
from ee_llm.evaluation.calibration.options import CalibrateOptions, check_calibration
from ee_llm.evaluation.calibration.result import CalibrationResult
from ee_llm.evaluation.text_pass import run_command, run_pass


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
    done = run_pass(
        options, "calibrating", lambda config: Calibration(config, options), options.measure
    )
    if done is None:
        return CalibrationResult.from_dict(run_command("calibrate", options))
    [found] = done.found
    return CalibrationResult.from_dict(
        found
        | {
            "checkpoint": str(done.reader.path),
            "fingerprint": done.reader.fingerprint(),
            "boundaries": done.reader.config().exits.boundaries,
            "num_layers": done.reader.config().model.num_layers,
            "inputs": done.inputs,
            "seq_length": done.seq_length,
            "dtype": done.dtype,
            "measure": options.measure,
            "risk": options.risk,
            "delta": options.delta,
        }
    )
