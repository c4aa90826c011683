"""Checks across sections.

Each check yields messages that name the options, their values and a remedy.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import get_args

from ee_llm.config.checks.deepspeed import deepspeed_problems
from ee_llm.config.checks.layerskip import layerskip_problems
from ee_llm.config.checks.tuning import tuning_problems
from ee_llm.config.limits import MAX_BATCH_SIZE, MAX_FACTOR
from ee_llm.config.schema import ConfigFields
from ee_llm.config.sections import HeadPart


def _layers(config: ConfigFields) -> Iterator[str]:
    num_layers, num_stages = config.depth, config.parallel.num_stages
    split = config.parallel.layer_split
    # A step of tuning computes no layer after the last trained exit, unless it distills.
    name = "model.num_layers" if num_layers == config.model.num_layers else "max(tuning.exits)"
    size = f"parallel.pipeline = {config.parallel.pipeline}"
    if config.parallel.virtual > 1:
        size += f" x parallel.virtual = {config.parallel.virtual}"
    if num_stages > num_layers:
        yield (
            f"{name} = {num_layers} is less than the number of pipeline stages, {num_stages} "
            f"({size}). Lower parallel.pipeline or parallel.virtual."
        )
    elif not split:
        if num_layers % num_stages and not config.is_tuning:
            yield (
                f"{name} = {num_layers} is not divisible by {size}. Set parallel.layer_split, for "
                f"example to {_example_split(num_layers, num_stages)}, or change one of them."
            )
    elif len(split) != num_stages or sum(split) != num_layers or min(split) < 1:
        yield (
            f"parallel.layer_split = {list(split)} must be {num_stages} positive numbers "
            f"({size}) with the sum {num_layers} ({name}), for example "
            f"{_example_split(num_layers, num_stages)}."
        )


def _example_split(num_layers: int, num_stages: int) -> str:
    # The last stage also computes the final exit, so the first stages get the remaining layers.
    quotient, remainder = divmod(num_layers, num_stages)
    return str([quotient + (stage < remainder) for stage in range(num_stages)])


def _schedule(config: ConfigFields) -> Iterator[str]:
    parallel = config.parallel
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual = {parallel.virtual} interleaves the stages of several processes, "
            "but parallel.pipeline = 1. Raise parallel.pipeline or set parallel.virtual to 1."
        )
    if parallel.virtual > 1 and parallel.schedule != "1f1b":
        yield (
            f"parallel.virtual = {parallel.virtual} cannot be combined with parallel.schedule = "
            f"{parallel.schedule}. Set parallel.virtual to 1 or parallel.schedule to 1f1b."
        )
    for name in ("fill_warmup", "fill_cooldown"):
        fills = getattr(parallel, name)
        if fills != "auto" and not 0 <= fills <= MAX_BATCH_SIZE:
            yield (
                f"parallel.{name} = {fills} must be from 0 to {MAX_BATCH_SIZE}. 0 disables filling."
            )
        if fills and (parallel.virtual > 1 or parallel.schedule != "1f1b"):
            yield (
                f"parallel.{name} = {fills} requires plain 1F1B. Set it to 0, or set "
                "parallel.virtual to 1 and parallel.schedule to 1f1b."
            )


def _heads(config: ConfigFields) -> Iterator[str]:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads = {model.num_heads} is not divisible by model.num_kv_heads = "
            f"{model.num_kv_heads}. Set model.num_kv_heads to a divisor of {model.num_heads}."
        )
    if model.position == "rope" and model.head_dim % 2:
        yield (
            f"model.head_dim = {model.head_dim} is odd, but rotary positions rotate pairs. Make it "
            "even or set model.position = learned."
        )


def _rope(config: ConfigFields) -> Iterator[str]:
    model = config.model
    scaling = f"model.rope_scaling = {model.rope_scaling}"
    if model.rope_scaling != "none" and model.position != "rope":
        yield (
            f"{scaling} has no effect with model.position = {model.position}. Set "
            "model.rope_scaling to none or model.position to rope."
        )
    used = {"none": (), "linear": ("rope_factor",), "llama3": _ROPE_NUMBERS}[model.rope_scaling]
    for name in _ROPE_NUMBERS:
        value = getattr(model, name)
        if name not in used and value != type(model).model_fields[name].default:
            needed = "linear or llama3" if name == "rope_factor" else "llama3"
            yield (
                f"model.{name} = {value} has no effect with {scaling}. Set model.rope_scaling to "
                f"{needed}, or omit {name}."
            )
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if model.rope_scaling == "llama3" and low >= high:
        yield (
            f"model.rope_low_freq_factor = {low} is not less than model.rope_high_freq_factor = "
            f"{high}. Lower the former or raise the latter."
        )


_ROPE_NUMBERS = (
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_length",
)


def _family(config: ConfigFields) -> Iterator[str]:
    model = config.model
    if model.family == "gpt" and not model.qkv_bias:
        yield (
            "model.qkv_bias = false is not possible with model.family = gpt, whose linear layers "
            "all have biases. Omit it, or set model.family = llama."
        )
    if model.family == "gpt" and model.qk_norm:
        yield (
            "model.qk_norm = true is not possible with model.family = gpt, which has no RMSNorm. "
            "Set it to false, or set model.family = llama."
        )
    if model.family == "llama" and model.gelu != "erf":
        yield (
            f"model.gelu = {model.gelu} has no effect with model.family = llama, whose MLP is "
            "SwiGLU. Omit it, or set model.family = gpt."
        )


def _tensor_parallel(config: ConfigFields) -> Iterator[str]:
    size = config.parallel.tensor
    # The sizes of a checkpoint's tensors are fixed.
    has_fixed_sizes = config.is_tuning or config.checkpoint.initial is not None
    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(config.model, name)
        if name == "num_kv_heads" and value == config.model.num_heads:
            continue  # The line about num_heads says it.
        if value % size:
            remedy = f"parallel.tensor to a divisor of {value}"
            if name in ("ffn_hidden_size", "vocab_size") and not has_fixed_sizes:
                remedy = f"model.{name} = {-(-value // size) * size}, or {remedy}"
            yield (
                f"model.{name} = {value} is not divisible by parallel.tensor = {size}. Set "
                f"{remedy}."
            )
    if config.parallel.sequence and size == 1:
        yield (
            "parallel.sequence = true requires tensor parallelism, but parallel.tensor = 1. Set "
            "parallel.tensor = 2 or more, or parallel.sequence = false."
        )
    if config.parallel.sequence and config.data.seq_length % size:
        yield (
            f"data.seq_length = {config.data.seq_length} is not divisible by parallel.tensor = "
            f"{size}, as parallel.sequence = true requires. Set data.seq_length = "
            f"{config.data.seq_length // size * size}."
        )


def _boundaries(config: ConfigFields) -> Iterator[str]:
    boundaries, num_layers = config.exits.boundaries, config.model.num_layers
    inside = [boundary for boundary in boundaries if 1 <= boundary < num_layers]
    for boundary in boundaries:
        if boundary not in inside:
            yield (
                f"exits.boundaries = {list(boundaries)}: boundary {boundary} is outside 1.."
                f"{num_layers - 1} (model.num_layers = {num_layers}, which always has the final "
                "exit). Remove or move it."
            )
    if any(a >= b for a, b in pairwise(boundaries)):
        yield (
            f"exits.boundaries = {list(boundaries)} must be strictly increasing. Write "
            f"{sorted(set(inside))}."
        )


def _per_exit_values(config: ConfigFields) -> Iterator[str]:
    exits = config.exits
    count = len(exits.boundaries)
    lists = {
        "weights": exits.weights,
        "initial_weights": exits.initial_weights,
        "temperatures": exits.temperatures,
    }
    for name, values in lists.items():
        if len(values) != count:
            yield (
                f"exits.{name} = {list(values)} has {len(values)} values for {count} exits "
                f"(exits.boundaries = {list(exits.boundaries)}). Give one value per exit, without "
                "the final exit."
            )
        minimum = 1 / MAX_FACTOR if name == "temperatures" else 0
        if any(not minimum <= value <= MAX_FACTOR for value in values):
            hint = "1 has no effect" if name == "temperatures" else "0 disables a loss"
            yield (
                f"exits.{name} = {list(values)} must be from {minimum:g} to {MAX_FACTOR:g}. {hint}."
            )
    if exits.weight_schedule == "constant" and any(exits.initial_weights):
        yield (
            f"exits.initial_weights = {list(exits.initial_weights)} has no effect with "
            "exits.weight_schedule = constant. Set exits.weight_schedule to linear or cosine, or "
            "omit exits.initial_weights."
        )


def _exit_head(config: ConfigFields) -> Iterator[str]:
    exits = config.exits
    ordered = [part for part in get_args(HeadPart) if part in exits.head]
    if list(exits.head) != ordered:
        yield (
            f"exits.head = {list(exits.head)} must name each module once, in order. Write "
            f"{ordered}."
        )
    if "mlp" in exits.head and "block" not in exits.head and exits.placement == "pre":
        yield (
            f"exits.head = {list(exits.head)} is not possible with exits.placement = pre: an mlp "
            "head reads the residual stream of its own layer after attention, which only the stage "
            "of that layer has. Set exits.placement = post, or add block to exits.head."
        )


def _data(config: ConfigFields) -> Iterator[str]:
    data = config.data
    if "" in data.prefixes:
        yield f"data.prefixes = {list(data.prefixes)} has an empty path. Remove it."
    if data.weights and len(data.weights) != len(data.prefixes):
        yield (
            f"data.weights = {list(data.weights)} has {len(data.weights)} values for "
            f"{len(data.prefixes)} data.prefixes. Give one value per prefix, or none."
        )
    if any(weight <= 0 for weight in data.weights):
        yield (
            f"data.weights = {list(data.weights)} must be greater than 0. Remove prefixes that you "
            "do not want to use."
        )
    if any(share < 0 for share in data.split) or abs(sum(data.split) - 1) > 1e-6:
        yield (
            f"data.split = {list(data.split)} must be three fractions from 0 to 1 with the sum 1, "
            "such as [0.98, 0.02, 0.0]."
        )
    if config.training.eval_interval and data.split[1] == 0:
        yield (
            f"training.eval_interval = {config.training.eval_interval} requires validation data, "
            f"but its share in data.split = {list(data.split)} is 0. Raise the share, or set "
            "training.eval_interval = 0."
        )
    if data.seq_length < 1:
        yield (
            f"data.seq_length = {data.seq_length} must be greater than 0. Omit it to use "
            "model.max_seq_length."
        )
    if data.seq_length > config.model.max_seq_length:
        yield (
            f"data.seq_length = {data.seq_length} is greater than model.max_seq_length = "
            f"{config.model.max_seq_length}. Lower the former or raise the latter."
        )


def _batch(config: ConfigFields) -> Iterator[str]:
    micro_batch, global_batch = config.training.micro_batch_size, config.training.global_batch_size
    if global_batch % micro_batch:
        yield (
            f"training.global_batch_size = {global_batch} is not divisible by "
            f"training.micro_batch_size = {micro_batch}. Set training.global_batch_size to "
            f"{-(-global_batch // micro_batch) * micro_batch} or change training.micro_batch_size."
        )


def _learning_rate(config: ConfigFields) -> Iterator[str]:
    optimizer = config.optimizer
    decay_steps = optimizer.decay_steps or config.training.steps
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr = {optimizer.min_lr} is greater than optimizer.lr = {optimizer.lr}. "
            "Lower the former or raise the latter."
        )
    limit = "optimizer.decay_steps" if optimizer.decay_steps else "training.steps"
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= decay_steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} must be less than "
            f"{limit} = {decay_steps}. Lower the former or raise the latter."
        )
    for name in ("min_lr", "decay_steps"):
        value = getattr(optimizer, name)
        if optimizer.schedule == "constant" and value:
            yield (
                f"optimizer.{name} = {value} has no effect with optimizer.schedule = constant. Set "
                f"optimizer.schedule to cosine, linear or wsd, or omit {name}."
            )
    if optimizer.schedule != "wsd" and optimizer.wsd_decay_steps:
        yield (
            f"optimizer.wsd_decay_steps = {optimizer.wsd_decay_steps} has no effect with "
            f"optimizer.schedule = {optimizer.schedule}. Set optimizer.schedule to wsd, or omit "
            "wsd_decay_steps."
        )
    maximum = decay_steps - optimizer.warmup_steps
    if optimizer.schedule == "wsd" and not 0 < optimizer.wsd_decay_steps <= max(maximum, 1):
        yield (
            f"optimizer.wsd_decay_steps = {optimizer.wsd_decay_steps} must be from 1 to {maximum}: "
            f"optimizer.decay_steps = {decay_steps} minus optimizer.warmup_steps = "
            f"{optimizer.warmup_steps}."
        )


def _traces(config: ConfigFields) -> Iterator[str]:
    outside = [s for s in config.logging.trace_steps if not 1 <= s <= config.training.steps]
    if outside:
        yield (
            f"logging.trace_steps = {list(config.logging.trace_steps)}: {outside} is outside 1 to "
            f"training.steps = {config.training.steps}. Remove these steps."
        )


CHECKS: tuple[Callable[[ConfigFields], Iterator[str]], ...] = (
    _layers,
    _schedule,
    _heads,
    _rope,
    _family,
    _tensor_parallel,
    _boundaries,
    _per_exit_values,
    _exit_head,
    _data,
    _batch,
    _learning_rate,
    _traces,
    tuning_problems,
    deepspeed_problems,
    layerskip_problems,
)


def problems(config: ConfigFields) -> list[str]:
    """Return the messages of all checks; empty if the configuration is valid."""
    return [message for check in CHECKS for message in check(config)]
