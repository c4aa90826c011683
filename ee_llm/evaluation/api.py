"""The functions of the Python API that measure generation: `ee_llm.sweep` and `ee_llm.report`."""

from collections.abc import Sequence
from pathlib import Path

from ee_llm.evaluation.options import listed
from ee_llm.evaluation.report.options import ReportOptions
from ee_llm.evaluation.report.report import report as _report
from ee_llm.evaluation.sweep.options import ExitStrategy, Family, SweepOptions
from ee_llm.evaluation.sweep.result import SweepResult
from ee_llm.evaluation.sweep.sweep import sweep as _sweep
from ee_llm.inference.choices import Attention, DtypeName, Measure


def sweep(
    checkpoint: str | Path,
    prompts: str | Path | Sequence[object] = (),
    *,
    data: Sequence[str | Path] | str | Path = (),
    text: Sequence[str | Path] | str | Path = (),
    num_prompts: int | None = None,
    prompt_length: int = 64,
    chat_template: str | Path | None = None,
    max_tokens: int = 64,
    ignore_eos: bool = False,
    families: Sequence[Family] | Family = ("thresholds", "self-speculative"),
    exits: Sequence[str | int] | str | int = (),
    thresholds: Sequence[float] | float = (),
    strategy: ExitStrategy = "exact",
    measure: Measure = "max_probability",
    policy: Sequence[str | Path] | str | Path = (),
    draft_exits: Sequence[int] | int = (),
    draft_lengths: Sequence[int] | int = (2, 4, 8),
    min_agreement: float = 0.99,
    batch_size: int = 1,
    rounds: int = 4,
    dtype: DtypeName = "auto",
    attention: Attention = "auto",
    cuda_graphs: bool = False,
    compile: bool = False,
    tensor: int = 1,
    pipeline: int = 1,
    timeout_s: float = 600.0,
    progress: bool = True,
) -> SweepResult:
    """Measure the speed and the quality of exit policies and drafts by generating text.

    Every set of exits is measured with every threshold, and every draft exit with every draft
    length, in turns with the full model. The quality of each is the share of its tokens that the
    full model finds most probable, given the same tokens before them.

    Args:
        checkpoint: Checkpoint directory, or run directory, whose newest checkpoint is used.
        prompts: A file of JSON lines with "prompt", "messages" or "prompt_token_ids", or a list of
            texts, lists of token ids, and conversations.
        data: Prefixes of token files that `ee-llm data prepare` wrote, to take prompts from.
        text: Files or folders of plain text, JSON or Parquet, to take prompts from.
        num_prompts: Number of prompts. None means all of `prompts`, and 16 of `data` or `text`.
        prompt_length: Tokens of a prompt from `data` or `text`.
        chat_template: File with a chat template (Jinja) to use instead of the model's own.
        max_tokens: Greatest number of tokens generated after each prompt.
        ignore_eos: Do not stop at the model's end tokens.
        families: What to measure: thresholds, drafts for self-speculative decoding, or both.
        exits: Sets of exits, such as "8", "8+16" or "all". Empty means each exit alone, and all.
        thresholds: Thresholds to measure for each set of exits, in (0, 1]. Empty means 0.5, 0.7,
            0.8, 0.9 and 0.95; the measures "entropy" and "saturation" have no default.
        strategy: Strategy for thresholds.
        measure: Measure of confidence for thresholds.
        policy: Policy files to measure as well.
        draft_exits: Exits that draft. Empty means each.
        draft_lengths: Numbers of tokens to draft before all layers check them.
        min_agreement: Least agreement with the full model of the recommended point.
        batch_size: Number of prompts that are decoded together.
        rounds: Number of rounds.
        dtype: Dtype of the computation, as in `LLM`.
        attention: Attention kernel, as in `LLM`.
        cuda_graphs: Replay passes with few rows as CUDA graphs.
        compile: Run the layers through torch.compile.
        tensor: Number of tensor-parallel ranks of each pipeline stage.
        pipeline: Number of pipeline stages.
        timeout_s: Maximum number of seconds to wait for another rank.
        progress: Show a progress bar in terminals.

    Raises:
        UserError: An argument, a prompt or the checkpoint is not valid.
        RunError: A request failed, or a rank was lost.
    """
    given: list[object] = [] if isinstance(prompts, str | Path) else list(prompts)
    options = SweepOptions(
        checkpoint=Path(checkpoint),
        prompts=Path(prompts) if isinstance(prompts, str | Path) else None,
        data=tuple(map(str, listed(data))),
        text=tuple(map(Path, listed(text))),
        num_prompts=num_prompts,
        prompt_length=prompt_length,
        chat_template=None if chat_template is None else Path(chat_template),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        families=tuple(listed(families)),
        exits=tuple(map(str, listed(exits))),
        thresholds=tuple(listed(thresholds)),
        strategy=strategy,
        measure=measure,
        policy=tuple(map(Path, listed(policy))),
        draft_exits=tuple(listed(draft_exits)),
        draft_lengths=tuple(listed(draft_lengths)),
        min_agreement=min_agreement,
        batch_size=batch_size,
        rounds=rounds,
        dtype=dtype,
        attention=attention,
        cuda_graphs=cuda_graphs,
        compile=compile,
        tensor=tensor,
        pipeline=pipeline,
        timeout_s=timeout_s,
        progress=progress,
    )
    return _sweep(options, given)


def report(
    checkpoint: str | Path,
    output: str | Path,
    *,
    data: Sequence[str | Path] | str | Path = (),
    text: Sequence[str | Path] | str | Path = (),
    sweep: str | Path | None = None,
    calibration: str | Path | None = None,
    num_tokens: int | None = None,
    seq_length: int | None = None,
    num_samples: int = 3,
    max_tokens: int = 64,
    dtype: DtypeName = "auto",
    progress: bool = True,
) -> None:
    """Write one HTML page about a model's exits, which needs no other file and no network.

    It shows the metrics and the reliability of every exit, a sweep and a calibration if they are
    given, generations colored by exit, and what to set.

    Args:
        checkpoint: Checkpoint directory, or run directory, whose newest checkpoint is used.
        output: HTML file to write.
        data: Prefixes of token files that `ee-llm data prepare` wrote. Use text that did not train
            the exits.
        text: Files or folders of plain text, JSON or Parquet, instead of `data`.
        sweep: JSON file with the result of a sweep of the same model.
        calibration: Policy file of a calibration of the same model.
        num_tokens: Number of tokens to predict, from the start of the text. None means all.
        seq_length: Length of a window in tokens, as in `evaluate`.
        num_samples: Number of generations to show.
        max_tokens: Greatest number of generated tokens in each of them.
        dtype: Dtype of the computation, as in `evaluate`.
        progress: Show progress bars in terminals.

    Raises:
        UserError: An argument, the text or the checkpoint is not valid, a file is not for this
            model, or the output cannot be written.
        RunError: The loss of an exit is not finite.
    """
    options = ReportOptions(
        checkpoint=Path(checkpoint),
        data=tuple(map(str, listed(data))),
        text=tuple(map(Path, listed(text))),
        sweep=None if sweep is None else Path(sweep),
        calibration=None if calibration is None else Path(calibration),
        num_tokens=num_tokens,
        seq_length=seq_length,
        num_samples=num_samples,
        max_tokens=max_tokens,
        dtype=dtype,
        progress=progress,
    )
    _report(options, Path(output))
