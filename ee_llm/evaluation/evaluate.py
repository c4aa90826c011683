"""Measure how well every exit of a checkpoint predicts given text."""

from ee_llm.evaluation.metrics import Metrics
from ee_llm.evaluation.options import EvaluateOptions
from ee_llm.evaluation.result import EvaluationResult, ExitMetrics
from ee_llm.evaluation.text_pass import run_command, run_pass


def evaluate(options: EvaluateOptions) -> EvaluationResult:
    """Return the metrics of every exit, on every rank that a launcher has started.

    With tensor x pipeline > 1 and without a launcher, this starts that many ranks on this machine.

    Args:
        options: The options.

    Raises:
        UserError: The options, the text or the checkpoint is not valid.
        RunError: The loss of an exit is not finite, or a rank failed or was lost.
    """
    done = run_pass(options, "evaluating", lambda config: Metrics())
    if done is None:
        return EvaluationResult.from_dict(run_command("evaluate", options))
    return EvaluationResult(
        str(done.reader.path),
        done.inputs,
        done.num_tokens,
        done.seq_length,
        done.dtype,
        tuple(ExitMetrics(**one) for one in done.found),
    )
