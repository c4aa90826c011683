"""The arguments of the model: what `--model_args` accepts, and what they mean for a checkpoint."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.config.limits import MAX_RANKS
from ee_llm.errors import RequestError
from ee_llm.inference.choices import DtypeName, Measure, check_choice
from ee_llm.inference.decoding.settings import CONTRASTS, Contrast
from ee_llm.inference.exits.policy import ExitPolicy, make_exit_policy, resolve_policy
from ee_llm.inference.strategies import FULL_DEPTH, STRATEGIES, SelfSpeculation, Strategy

FINAL = "final"
_ALWAYS = sys.float_info.min  # a threshold that every confidence reaches
_LIMITS = {
    "max_gen_toks": 2**30,
    "max_length": 2**30,
    "tensor": MAX_RANKS,
    "pipeline": MAX_RANKS,
    "max_num_seqs": 2**14,
    "cache_tokens": 2**40,
}
_DRAFT = ("draft_exit", "draft_length", "draft_threshold")


@dataclass(frozen=True)
class HarnessOptions:
    """Arguments of the model `ee_llm`.

    Attributes:
        pretrained: Checkpoint directory, or run directory, whose newest checkpoint is used. lm_eval
            names the folder of the results after it. `checkpoint` is another name for it.
        dtype: Dtype of the computation; "auto" is bfloat16 where the device supports it in
            hardware, else float32.
        strategy: Decoding strategy. The default is "exact" if exits are selected with `policy`,
            `threshold` or `exit`, else "full".
        policy: Policy file.
        threshold: Confidence threshold for all exits, in (0, 1].
        measure: Measure of confidence for `threshold`.
        exit: Boundary of the exit that predicts every token, or "final".
        tensor: Number of tensor-parallel ranks of each pipeline stage.
        pipeline: Number of pipeline stages.
        max_num_seqs: Maximum number of sequences that generate at once. The default is lm_eval's
            batch size if that is a number above 1, else 16.
        cache_tokens: Size of the K/V cache for generation, in positions of all sequences.
        max_length: Maximum number of tokens that the model sees. The default, and the limit, is
            the model's max_seq_length.
        max_gen_toks: Maximum number of generated tokens if the task does not say.
        add_bos_token: Whether texts start with the beginning-of-sequence token. The default
            follows the tokenizer's settings.
        chat_template: File with a chat template (Jinja) to use instead of the model's own.
        batch_size: lm_eval's batch size.
        max_batch_size: Ignored: the engine admits as many sequences as fit.
        device: The device in use: the first visible GPU if there is one. lm_eval's default means
            whatever device is used.
        trust_remote_code: Ignored: checkpoints contain no code.
    """

    pretrained: str | Path
    dtype: DtypeName = "auto"
    strategy: Strategy | None = None
    policy: str | Path | None = None
    threshold: float | None = None
    measure: Measure | None = None
    exit: int | str | None = None
    tensor: int = 1
    pipeline: int = 1
    max_num_seqs: int | None = None
    cache_tokens: int = 65536
    max_length: int | None = None
    max_gen_toks: int = 256
    add_bos_token: bool | None = None
    chat_template: str | Path | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None
    device: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Decoding:
    """How a model predicts tokens.

    Attributes:
        strategy: The strategy, with its settings if it has any.
        policy: The exit policy.
    """

    strategy: Strategy | SelfSpeculation | Contrast
    policy: ExitPolicy


def parse_arguments(given: Mapping[str, Any]) -> tuple[HarnessOptions, dict[str, Any]]:
    """Return the options among the arguments, and the settings of a strategy among them.

    Raises RequestError for an argument that is unknown, missing or out of range.
    """
    given = _with_name(given)
    known = {field.name for field in fields(HarnessOptions)}
    prefixes = tuple(f"{name}_" for name in CONTRASTS)
    own = {n: v for n, v in given.items() if n in _DRAFT or n.startswith(prefixes)}
    unknown = sorted(given.keys() - known - own.keys())
    if unknown:
        contrasts = [f"{name}_{f.name}" for name, kind in CONTRASTS.items() for f in fields(kind)]
        raise RequestError(
            f"model_args: {unknown[0]!r} is unknown. Use one of"
            f" {', '.join([*sorted(known), *_DRAFT, *contrasts])}."
        )
    options = HarnessOptions(**{name: given[name] for name in given.keys() & known})
    check_choice("dtype", options.dtype, get_args(DtypeName))
    if options.strategy is not None:
        check_choice("strategy", options.strategy, STRATEGIES)
    if options.measure is not None:
        check_choice("measure", options.measure, get_args(Measure))
    for name in ("pretrained", "policy", "chat_template"):
        path = getattr(options, name)
        if path is not None and not isinstance(path, str | Path):  # lm_eval reads 12 as a number.
            raise RequestError(
                f"{name} = {path!r} is not a path. Write ./{path} for a file or folder."
            )
    for name, most in _LIMITS.items():
        value = getattr(options, name)
        is_default = value is None and getattr(HarnessOptions, name) is None
        if not is_default and (type(value) is not int or not 1 <= value <= most):
            raise RequestError(f"{name} = {value!r} must be an integer from 1 to {most}.")
    if options.exit is not None and type(options.exit) not in (int, str):
        raise RequestError(f"exit = {options.exit!r} must be a number of layers, or {FINAL}.")
    if not distributed.is_device_in_use(options.device):
        raise RequestError(
            f"device = {options.device!r} (--device) is not the device in use, which is"
            f" {distributed.device()}. Leave it out, and select a GPU with CUDA_VISIBLE_DEVICES=1,"
            " say, or the CPU with CUDA_VISIBLE_DEVICES= (empty)."
        )
    if type(options.add_bos_token) is not bool and options.add_bos_token is not None:
        raise RequestError(f"add_bos_token = {options.add_bos_token!r} must be True or False.")
    return options, own


def _with_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with the model as `pretrained`; raises RequestError without one."""
    names = [name for name in ("pretrained", "checkpoint") if given.get(name) is not None]
    if len(names) != 1:
        found = (
            f"pretrained = {given['pretrained']} and checkpoint = {given['checkpoint']} mean the"
            " same, but both are given"
            if names
            else "pretrained is missing"
        )
        raise RequestError(f"model_args: {found}. Give --model_args pretrained=runs/tuned.")
    others = {name: value for name, value in given.items() if name != "checkpoint"}
    return {**others, "pretrained": given[names[0]]}


def num_sequences(options: HarnessOptions) -> int:
    """Return the number of sequences that generate at once."""
    if options.max_num_seqs is not None:
        return options.max_num_seqs
    size = str(options.batch_size)
    return int(size) if size.isdecimal() and int(size) > 1 else 16


def resolve_decoding(
    options: HarnessOptions, own: Mapping[str, Any], config: Config, fingerprint: Any
) -> Decoding:
    """Return how a model predicts tokens.

    Args:
        options: The arguments.
        own: The settings of a strategy among the arguments.
        config: The model's configuration.
        fingerprint: Returns the model's fingerprint, which a calibrated policy must name.

    Raises:
        RequestError: The arguments contradict each other, or do not fit the model.
    """
    selecting = [n for n in ("policy", "threshold", "exit") if getattr(options, n) is not None]
    if len(selecting) > 1:
        raise RequestError(
            f"{' and '.join(f'{n} = {getattr(options, n)}' for n in selecting)} are given. Use one"
            " of them."
        )
    if options.measure is not None and options.threshold is None:
        raise RequestError(
            f"measure = {options.measure!r} needs threshold. A policy file has its own measure."
        )
    name = options.strategy
    selects_final = options.exit == FINAL
    if name is None:
        name = "exact" if selecting and not selects_final else "full"
    if name in FULL_DEPTH and selecting and not selects_final:
        raise RequestError(
            f"strategy = {name!r} runs every token through all layers, so {selecting[0]} ="
            f" {getattr(options, selecting[0])} has no effect. Remove one of them."
        )
    if name not in FULL_DEPTH and not selecting:
        raise RequestError(
            f"strategy = {name!r} needs exits. Give policy (a file), threshold or exit."
        )
    return Decoding(_strategy(name, own), _policy(options, config, fingerprint))


def _strategy(name: Strategy, own: Mapping[str, Any]) -> Strategy | SelfSpeculation | Contrast:
    """Return a strategy with its settings; raises RequestError for those of another one."""
    prefix = "draft_" if name == "self-speculative" else f"{name}_"
    foreign = sorted(key for key in own if not key.startswith(prefix))
    if foreign:
        owner = "self-speculative" if foreign[0] in _DRAFT else foreign[0].partition("_")[0]
        raise RequestError(
            f"{foreign[0]} belongs to strategy = {owner!r}, but the strategy is {name!r}. Remove"
            " one of them."
        )
    if name == "self-speculative":
        return SelfSpeculation(**own)
    if name not in CONTRASTS:
        return name
    settings = {key.removeprefix(prefix): value for key, value in own.items()}
    names = [field.name for field in fields(CONTRASTS[name])]
    unknown = sorted(settings.keys() - set(names))
    if unknown:
        choices = ", ".join(f"{prefix}{one}" for one in names)
        raise RequestError(f"model_args: {prefix}{unknown[0]!s} is unknown. Use one of {choices}.")
    return CONTRASTS[name](**settings)


def _policy(options: HarnessOptions, config: Config, fingerprint: Any) -> ExitPolicy:
    boundaries, last = config.exits.boundaries, config.model.num_layers
    if options.policy is not None:
        return resolve_policy(Path(options.policy), boundaries, fingerprint)
    if options.threshold is not None:
        if not boundaries:
            raise RequestError(
                f"threshold = {options.threshold}: the model has no early exits. Remove it, or add"
                " exits with 'ee-llm checkpoint add-exits', and tune them."
            )
        threshold: Any = options.threshold
        return make_exit_policy(boundaries, [threshold], options.measure or "max_probability")
    if options.exit is None or options.exit in (FINAL, last):
        return resolve_policy("off", boundaries)
    if options.exit not in boundaries:
        raise RequestError(
            f"exit = {options.exit!r} is not an exit of the model. Use one of"
            f" {', '.join(map(str, (*boundaries, FINAL)))}."
        )
    thresholds = [_ALWAYS if boundary == options.exit else None for boundary in boundaries]
    return make_exit_policy(boundaries, thresholds)
