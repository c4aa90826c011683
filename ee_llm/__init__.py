"""Early-exit large language models: train, tune, convert, evaluate and run them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ee_llm.version import __version__

if TYPE_CHECKING:
    from ee_llm.api import (
        TrainingResult as TrainingResult,
    )
    from ee_llm.api import (
        calibrate as calibrate,
    )
    from ee_llm.api import (
        convert as convert,
    )
    from ee_llm.api import (
        evaluate as evaluate,
    )
    from ee_llm.api import (
        plan as plan,
    )
    from ee_llm.api import (
        train as train,
    )
    from ee_llm.api import (
        tune as tune,
    )
    from ee_llm.config import Config as Config
    from ee_llm.config import load_config as load_config
    from ee_llm.errors import RunError as RunError
    from ee_llm.errors import UserError as UserError
    from ee_llm.evaluation.api import report as report
    from ee_llm.evaluation.api import sweep as sweep
    from ee_llm.evaluation.calibration.result import CalibrationResult as CalibrationResult
    from ee_llm.evaluation.probe.api import (
        probe as probe,
    )
    from ee_llm.evaluation.probe.result import ProbeResult as ProbeResult
    from ee_llm.evaluation.result import EvaluationResult as EvaluationResult
    from ee_llm.evaluation.result import ExitMetrics as ExitMetrics
    from ee_llm.evaluation.sweep.point import SweepPoint as SweepPoint
    from ee_llm.evaluation.sweep.result import SweepResult as SweepResult
    from ee_llm.inference.decoding.settings import SLED as SLED
    from ee_llm.inference.decoding.settings import DoLa as DoLa
    from ee_llm.inference.exits.policy import ExitPolicy as ExitPolicy
    from ee_llm.inference.llm import LLM as LLM
    from ee_llm.inference.outputs import RequestOutput as RequestOutput
    from ee_llm.inference.outputs import TokenOutput as TokenOutput
    from ee_llm.inference.sampling.params import SamplingParams as SamplingParams
    from ee_llm.inference.strategies import SelfSpeculation as SelfSpeculation
    from ee_llm.inference.verification.verify import VerificationReport as VerificationReport
    from ee_llm.serving.async_llm import AsyncLLM as AsyncLLM

# The public API, by the module that defines each name. Modules are imported on first use, so that
# `import ee_llm` is fast.
_EXPORTS = {
    "LLM": "ee_llm.inference.llm",
    "AsyncLLM": "ee_llm.serving.async_llm",
    "SamplingParams": "ee_llm.inference.sampling.params",
    "ExitPolicy": "ee_llm.inference.exits.policy",
    "SelfSpeculation": "ee_llm.inference.strategies",
    "SLED": "ee_llm.inference.decoding.settings",
    "DoLa": "ee_llm.inference.decoding.settings",
    "RequestOutput": "ee_llm.inference.outputs",
    "TokenOutput": "ee_llm.inference.outputs",
    "VerificationReport": "ee_llm.inference.verification.verify",
    "EvaluationResult": "ee_llm.evaluation.result",
    "CalibrationResult": "ee_llm.evaluation.calibration.result",
    "ExitMetrics": "ee_llm.evaluation.result",
    "ProbeResult": "ee_llm.evaluation.probe.result",
    "SweepResult": "ee_llm.evaluation.sweep.result",
    "SweepPoint": "ee_llm.evaluation.sweep.point",
    "convert": "ee_llm.api",
    "train": "ee_llm.api",
    "tune": "ee_llm.api",
    "evaluate": "ee_llm.api",
    "calibrate": "ee_llm.api",
    "probe": "ee_llm.evaluation.probe.api",
    "sweep": "ee_llm.evaluation.api",
    "report": "ee_llm.evaluation.api",
    "plan": "ee_llm.api",
    "TrainingResult": "ee_llm.api",
    "Config": "ee_llm.config",
    "load_config": "ee_llm.config",
    "UserError": "ee_llm.errors",
    "RunError": "ee_llm.errors",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
