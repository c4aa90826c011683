"""Checks across sections. Each yields lines that name the options, their values and the mend."""

from collections.abc import Callable, Iterator
from itertools import pairwise

from ee_llm.config.checks.deepspeed import deepspeed_problems
from ee_llm.config.checks.tuning import tuning_problems
from ee_llm.config.limits import MAX_BATCH_SIZE, MAX_FACTOR
from ee_llm.config.schema import ConfigFields


def _layers(config: ConfigFields) -> Iterator[str]:
    num_layers, num_stages = config.depth, config.parallel.num_stages
    split = config.parallel.layer_split
    # In tuning no layer is built behind the last exit that is trained.
    name = "max(tuning.exits)" if config.is_tuning else "model.num_layers"
    size = f"parallel.pipeline = {config.parallel.pipeline}"
    if config.parallel.virtual > 1:
        size += f" x parallel.virtual = {config.parallel.virtual}"
    if num_stages > num_layers:
        yield (
            f"{name} = {num_layers} is below {num_stages} stages ({size}), each of which "
            "needs a layer; lower parallel.pipeline or parallel.virtual"
        )
    elif not split:
        if num_layers % num_stages and not config.is_tuning:
            yield (
                f"{name} = {num_layers} is not divisible by {size}; give "
                f"parallel.layer_split, for example {_example_split(num_layers, num_stages)}, or "
                "change one of them"
            )
    elif len(split) != num_stages or sum(split) != num_layers or min(split) < 1:
        yield (
            f"parallel.layer_split = {list(split)} must be {num_stages} positive numbers "
            f"({size}) that add up to {num_layers} ({name}), for example "
            f"{_example_split(num_layers, num_stages)}"
        )


def _example_split(num_layers: int, num_stages: int) -> str:
    # The last stage has the head as well, so the layers that are over go to the first ones.
    even, over = divmod(num_layers, num_stages)
    return str([even + (stage < over) for stage in range(num_stages)])


def _schedule(config: ConfigFields) -> Iterator[str]:
    parallel = config.parallel
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual = {parallel.virtual} interleaves the stages of several processes, "
            "and parallel.pipeline = 1; raise the second or set the first to 1"
        )
    if parallel.virtual > 1 and parallel.schedule != "1f1b":
        yield (
            f"parallel.virtual = {parallel.virtual} does not go with parallel.schedule = "
            f"{parallel.schedule}; set the first to 1 or the second to 1f1b"
        )
    for name in ("fill_warmup", "fill_cooldown"):
        fills = getattr(parallel, name)
        if fills != "auto" and not 0 <= fills <= MAX_BATCH_SIZE:
            yield f"parallel.{name} = {fills} must be from 0 to {MAX_BATCH_SIZE}; 0 fills nothing"
        if fills and (parallel.virtual > 1 or parallel.schedule != "1f1b"):
            yield (
                f"parallel.{name} = {fills} fills the bubbles of plain 1F1B; set it to 0, or "
                "parallel.virtual to 1 and parallel.schedule to 1f1b"
            )


def _heads(config: ConfigFields) -> Iterator[str]:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads = {model.num_heads} is not divisible by model.num_kv_heads = "
            f"{model.num_kv_heads}; choose a divisor of {model.num_heads}"
        )
    if model.position == "rope" and model.head_dim % 2:
        yield (
            f"model.head_dim = {model.head_dim} is odd, and rotary positions turn pairs; make it "
            "even or set model.position = learned"
        )


def _rope(config: ConfigFields) -> Iterator[str]:
    model = config.model
    scaling = f"model.rope_scaling = {model.rope_scaling}"
    if model.rope_scaling != "none" and model.position != "rope":
        yield (
            f"{scaling} has no effect with model.position = {model.position}; set the first to "
            "none or the second to rope"
        )
    used = {"none": (), "linear": ("rope_factor",), "llama3": _ROPE_NUMBERS}[model.rope_scaling]
    for name in _ROPE_NUMBERS:
        value = getattr(model, name)
        if name not in used and value != type(model).model_fields[name].default:
            needed = "linear or llama3" if name == "rope_factor" else "llama3"
            yield (
                f"model.{name} = {value} has no effect with {scaling}; set it to {needed}, or "
                f"leave {name} out"
            )
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if model.rope_scaling == "llama3" and low >= high:
        yield (
            f"model.rope_low_freq_factor = {low} is not below model.rope_high_freq_factor = "
            f"{high}; lower the first or raise the second"
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
            "model.qkv_bias = false with model.family = gpt, all of whose linear layers have "
            "biases; leave it out, or set model.family = llama"
        )
    if model.family == "gpt" and model.qk_norm:
        yield (
            "model.qk_norm = true with model.family = gpt, which has no RMSNorm; set it to false, "
            "or model.family to llama"
        )
    if model.family == "llama" and model.gelu != "erf":
        yield (
            f"model.gelu = {model.gelu} has no effect with model.family = llama, whose MLP is "
            "SwiGLU; leave it out, or set model.family = gpt"
        )


def _tensor_parallel(config: ConfigFields) -> Iterator[str]:
    size = config.parallel.tensor
    # A checkpoint's tensors have the sizes that they have.
    is_given = config.is_tuning or config.checkpoint.initial is not None
    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(config.model, name)
        if name == "num_kv_heads" and value == config.model.num_heads:
            continue  # said already
        if value % size:
            mend = f"parallel.tensor to a divisor of {value}"
            if name in ("ffn_hidden_size", "vocab_size") and not is_given:
                mend = f"model.{name} = {-(-value // size) * size}, or {mend}"
            yield (
                f"model.{name} = {value} is not divisible by parallel.tensor = {size}; set {mend}"
            )
    if config.parallel.sequence and size == 1:
        yield (
            "parallel.sequence = true needs tensor parallelism, and parallel.tensor = 1; set "
            "parallel.tensor = 2 or more, or parallel.sequence = false"
        )
    if config.parallel.sequence and config.data.seq_length % size:
        yield (
            f"data.seq_length = {config.data.seq_length} is not divisible by parallel.tensor = "
            f"{size}, which parallel.sequence = true needs; set data.seq_length = "
            f"{config.data.seq_length // size * size}"
        )


def _boundaries(config: ConfigFields) -> Iterator[str]:
    boundaries, num_layers = config.exits.boundaries, config.model.num_layers
    inside = [boundary for boundary in boundaries if 1 <= boundary < num_layers]
    for boundary in boundaries:
        if boundary not in inside:
            yield (
                f"exits.boundaries = {list(boundaries)}: boundary {boundary} is outside 1.."
                f"{num_layers - 1} (model.num_layers = {num_layers}, whose own exit is always "
                "there); remove or move it"
            )
    if any(a >= b for a, b in pairwise(boundaries)):
        yield (
            f"exits.boundaries = {list(boundaries)} does not increase; write {sorted(set(inside))}"
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
                f"(exits.boundaries = {list(exits.boundaries)}); give one for each, the final exit "
                "not counted"
            )
        least = 1 / MAX_FACTOR if name == "temperatures" else 0
        if any(not least <= value <= MAX_FACTOR for value in values):
            mend = "1 is neutral" if name == "temperatures" else "0 switches a loss off"
            yield f"exits.{name} = {list(values)} must be from {least:g} to {MAX_FACTOR:g}; {mend}"
    if exits.weight_schedule == "constant" and any(exits.initial_weights):
        yield (
            f"exits.initial_weights = {list(exits.initial_weights)} has no effect with "
            "exits.weight_schedule = constant; set it to linear or cosine, or leave "
            "initial_weights out"
        )


def _exit_head(config: ConfigFields) -> Iterator[str]:
    exits = config.exits
    ordered = [part for part in ("block", "mlp", "norm") if part in exits.head]
    if list(exits.head) != ordered:
        yield f"exits.head = {list(exits.head)} must name each part once, in order: write {ordered}"
    if "mlp" in exits.head and "block" not in exits.head and exits.placement == "pre":
        yield (
            f"exits.head = {list(exits.head)} with exits.placement = pre: an mlp head reads its "
            "own layer's residual stream after attention, which only that layer's stage has; set "
            "exits.placement = post, or add block to the head"
        )


def _data(config: ConfigFields) -> Iterator[str]:
    data = config.data
    if "" in data.prefixes:
        yield f"data.prefixes = {list(data.prefixes)} has an empty path; leave it out"
    if data.weights and len(data.weights) != len(data.prefixes):
        yield (
            f"data.weights = {list(data.weights)} has {len(data.weights)} values for "
            f"{len(data.prefixes)} data.prefixes; give one for each, or none"
        )
    if any(weight <= 0 for weight in data.weights):
        yield (
            f"data.weights = {list(data.weights)} must be greater than 0; leave out a prefix that "
            "is not wanted"
        )
    if any(share < 0 for share in data.split) or abs(sum(data.split) - 1) > 1e-6:
        yield (
            f"data.split = {list(data.split)} must be three fractions from 0 to 1 that add up to "
            "1, such as [0.98, 0.02, 0.0]"
        )
    if config.training.eval_interval and data.split[1] == 0:
        yield (
            f"training.eval_interval = {config.training.eval_interval} finds nothing to read: "
            f"data.split = {list(data.split)} has no validation part; set training.eval_interval = "
            "0, or give the part a share"
        )
    if data.seq_length < 1:
        yield (
            f"data.seq_length = {data.seq_length} must be greater than 0; leave it out for "
            "sequences of model.max_seq_length"
        )
    if data.seq_length > config.model.max_seq_length:
        yield (
            f"data.seq_length = {data.seq_length} is greater than model.max_seq_length = "
            f"{config.model.max_seq_length}; lower the first or raise the second"
        )


def _batch(config: ConfigFields) -> Iterator[str]:
    micro, whole = config.training.micro_batch_size, config.training.global_batch_size
    if whole % micro:
        yield (
            f"training.global_batch_size = {whole} is not divisible by training.micro_batch_size = "
            f"{micro}; set the first to {-(-whole // micro) * micro} or change the second"
        )


def _learning_rate(config: ConfigFields) -> Iterator[str]:
    optimizer = config.optimizer
    decay_steps = optimizer.decay_steps or config.training.steps
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr = {optimizer.min_lr} is greater than optimizer.lr = {optimizer.lr}; "
            "lower the first or raise the second"
        )
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= decay_steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} leaves nothing of "
            f"optimizer.decay_steps = {decay_steps}; lower the first or raise the second"
        )
    for name in ("min_lr", "decay_steps"):
        value = getattr(optimizer, name)
        if optimizer.schedule == "constant" and value:
            yield (
                f"optimizer.{name} = {value} has no effect with optimizer.schedule = constant; set "
                f"it to cosine, linear or wsd, or leave {name} out"
            )
    if optimizer.schedule != "wsd" and optimizer.wsd_decay_steps:
        yield (
            f"optimizer.wsd_decay_steps = {optimizer.wsd_decay_steps} has no effect with "
            f"optimizer.schedule = {optimizer.schedule}; set it to wsd, or leave "
            "wsd_decay_steps out"
        )
    room = decay_steps - optimizer.warmup_steps
    if optimizer.schedule == "wsd" and not 0 < optimizer.wsd_decay_steps <= max(room, 1):
        yield (
            f"optimizer.wsd_decay_steps = {optimizer.wsd_decay_steps} must be from 1 to {room}: "
            f"optimizer.decay_steps = {decay_steps} less optimizer.warmup_steps = "
            f"{optimizer.warmup_steps}"
        )


def _traces(config: ConfigFields) -> Iterator[str]:
    outside = [s for s in config.logging.trace_steps if not 1 <= s <= config.training.steps]
    if outside:
        yield (
            f"logging.trace_steps = {list(config.logging.trace_steps)} names {outside}, outside of "
            f"1 to training.steps = {config.training.steps}; leave them out"
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
)


def problems(config: ConfigFields) -> list[str]:
    """All lines of all checks; empty when the configuration is sound."""
    return [line for check in CHECKS for line in check(config)]
