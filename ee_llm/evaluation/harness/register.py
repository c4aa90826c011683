"""Make the model known to lm_eval by its name, `ee_llm`.

lm_eval 0.4.13 knows the models of its own package only: it has no entry points for others, and
`--include_path` reads tasks, not models. This module is therefore an entry point of torch, which
calls `register_in_lm_eval` at the end of its own import. lm_eval imports torch before it looks up a
model. The module imports nothing else, so that it costs other programs nothing.
"""

import logging
import sys

NAME = "ee_llm"
TARGET = "ee_llm.evaluation.harness.model:EarlyExitLM"


def register() -> None:
    """Make the model known to lm_eval. It is imported when somebody uses it."""
    # lm_eval imports its own models only as long as its registry is empty, so import them first.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def register_in_lm_eval() -> None:
    """Call `register` if this process has imported lm_eval, and do nothing otherwise.

    torch fails to import if this function raises, so neither a damaged installation nor a future
    lm_eval with another registry may stop it. In this case, a warning gives the reason, and
    `lm_eval --model ee_llm` reports that there is no such model.
    """
    if "lm_eval" not in sys.modules:
        return
    try:
        register()
    except Exception as error:
        logging.getLogger(__name__).warning(
            "The model %r cannot be added to lm_eval (%s: %s). Install a version of lm_eval for"
            " which it is made: pip install 'ee-llm[eval]'.",
            NAME,
            type(error).__name__,
            error,
        )
