"""Requests of lm_eval as windows to score and as sampling parameters."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from ee_llm.errors import RequestError
from ee_llm.evaluation.harness.scoring_pass import Window
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.text.json_lines import short

_PASSED_ON = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_HANDLED = {*_PASSED_ON, "until", "max_gen_toks", "do_sample"}


def make_window(
    context: Sequence[int],
    continuation: Sequence[int],
    max_length: int,
    texts: tuple[str, str] | None = None,
) -> Window:
    """Return the window that scores a continuation after as much of its context as fits.

    Args:
        context: Token ids of the context.
        continuation: Token ids of the continuation.
        max_length: Maximum number of tokens that the model sees.
        texts: The texts of both, for error messages.

    Raises:
        RequestError: The context or the continuation is empty, or the continuation does not fit.
    """
    where = "a request" if texts is None else f"the request {short(texts)}"
    if not 0 < len(continuation) <= max_length:
        raise RequestError(
            f"{where}: the continuation has {len(continuation)} tokens. It must have 1 to"
            f" max_length = {max_length}. Change the task's doc_to_choice or doc_to_target."
        )
    if not context:
        raise RequestError(
            f"{where}: the context has no tokens, so nothing predicts the first token of the"
            " continuation. Use a context that is not blank, or --model_args add_bos_token=True if"
            " the tokenizer has a beginning-of-sequence token."
        )
    tokens = (*context, *continuation)[-(max_length + 1) :][:-1]
    return Window(tokens, (tuple(continuation),))


def merge_windows(windows: Sequence[Window]) -> list[tuple[Window, list[int]]]:
    """Return windows without repeated passes, and the numbers of the given windows in each.

    Windows whose input tokens and numbers of scored rows are equal differ in the last token of
    their continuations only, as the choices of many tasks do. The longest windows come first.
    """
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, window in enumerate(windows):
        groups.setdefault((window.tokens, window.num_scored), []).append(number)
    merged = [
        (Window(tokens, tuple(windows[n].continuations[0] for n in numbers)), numbers)
        for (tokens, _), numbers in groups.items()
    ]
    return sorted(merged, key=lambda pair: len(pair[0].tokens), reverse=True)


def sampling_params(
    generation: Mapping[str, Any], max_gen_toks: int, eos_text: str | None
) -> SamplingParams:
    """Return the parameters that a task's `generation_kwargs` describe.

    Args:
        generation: The task's settings, with the names of lm_eval.
        max_gen_toks: Number of tokens to generate if the task does not say.
        eos_text: Text of the end token, at which a generation also ends; None if it has no text.

    Raises:
        RequestError: A setting is unknown or out of range.
    """
    try:
        given = dict(normalize_gen_kwargs(dict(generation), max_gen_toks))
    except (TypeError, ValueError) as error:
        raise RequestError(f"generation_kwargs = {dict(generation)}: {error}.") from None
    if given["max_gen_toks"] < 1:
        raise RequestError(
            f"generation_kwargs: max_gen_toks = {given['max_gen_toks']} must be at least 1."
        )
    if given.get("num_beams") == 1:
        del given["num_beams"]
    unknown = sorted(given.keys() - _HANDLED)
    if unknown:
        raise RequestError(
            f"generation_kwargs: {unknown[0]} = {given[unknown[0]]!r} is not supported. Use some of"
            f" {', '.join(sorted(_HANDLED))}."
        )
    until = handle_stop_sequences(given["until"], eos=eos_text)
    is_greedy = not given["do_sample"]
    options = {n: given[n] for n in _PASSED_ON if given.get(n) is not None}
    if is_greedy:
        options["temperature"] = 0.0
    elif "temperature" not in options:
        options["temperature"] = 1.0
    stop = tuple(text for text in until if text)
    return SamplingParams(max_tokens=given["max_gen_toks"], stop=stop, **options)


def with_own_seeds(
    prompts: Iterable[tuple[int, ...]], params: Iterable[SamplingParams]
) -> list[SamplingParams]:
    """Return parameters in which the repetitions of a request draw other samples."""
    seen: Counter[tuple[tuple[int, ...], SamplingParams]] = Counter()
    result = []
    for prompt, one in zip(prompts, params, strict=True):
        result.append(one.sample(seen[prompt, one]))
        seen[prompt, one] += 1
    return result
