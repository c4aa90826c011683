"""The sections of the configuration except the model's, one documented field per option."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from ee_llm.config import toml
from ee_llm.config.base import (
    Floats,
    Integers,
    PathText,
    PathTexts,
    Section,
    fill,
    list_to_tuple,
    option,
)
from ee_llm.config.limits import (
    MAX_BATCH_SIZE,
    MAX_FACTOR,
    MAX_FLOAT,
    MAX_LAYERS,
    MAX_RANKS,
    MAX_RATE,
    MAX_SEED,
    MAX_STEPS,
    MAX_TIMEOUT_S,
    MIN_TIMEOUT_S,
)
from ee_llm.errors import ConfigError

HeadPart = Literal["block", "mlp", "translator", "norm"]
"""A module of an exit, in the order in which they run."""


class ExitsConfig(Section):
    """The early exits: positions, heads and loss weights."""

    boundaries: Integers = option(
        (),
        "Positions of the early exits, in increasing order. Exit b reads the residual stream after "
        "layer b, with 1 <= b < num_layers. all: an exit after every layer.",
        words=("all",),
    )
    placement: Literal["post", "pre"] = option(
        "post",
        "Pipeline stage of the exit at boundary b. post: the stage of layer b. pre: the stage of "
        "layer b+1. Results are the same; memory and time differ.",
    )
    head: Annotated[tuple[HeadPart, ...], BeforeValidator(list_to_tuple)] = option(
        ("norm",),
        "Modules between the boundary and the output projection: any of block (a transformer "
        "layer), mlp, translator (an affine map of the normalized hidden state) and norm, in this "
        "order.",
    )
    output: Literal["tied", "shared", "own"] = option(
        "shared",
        "Output weight of the exits: tied to the word embedding, shared with the final exit, or "
        "own (one per exit).",
    )
    initialization: Literal["copy", "random"] = option(
        "copy",
        "Initial weights of exits that tuning.checkpoint or checkpoint.initial does not have. "
        "copy: from the final norm and output weight, the MLP of the exit's layer, and (block) the "
        "next layer. random: random weights. A translator starts as the identity in both.",
    )
    norm: Literal["own", "shared"] = option(
        "own",
        "Norm of each exit's head. own: one per exit. shared: all exits and the final exit have "
        "equal norms, and each trains with the sum of their gradients.",
    )
    weighting: Literal["weights", "depth"] = option(
        "weights",
        "Origin of the loss weights. weights: the option weights. depth: weights that grow with "
        "the depth of the exit and sum to 1 over all exits of a step, the final exit included "
        "(LayerSkip).",
    )
    depth_scale: float = option(
        1.0,
        "Scale of the early exits' weights against the final exit's, for weighting = depth "
        "(LayerSkip's e_scale).",
        gt=0,
        le=MAX_FACTOR,
    )
    curriculum: Literal["none", "rotational", "gradual"] = option(
        "none",
        "Early exits that a step computes and trains, for weighting = depth. none: all. "
        "rotational: every rotation_interval-th, shifted by one exit in each step. gradual: in the "
        "first step none, then from the last to the first, all of them after half of "
        "training.steps.",
    )
    rotation_interval: int = option(
        1,
        "Distance between the exits of a step in a rotational curriculum, in exits (LayerSkip's "
        "R).",
        gt=0,
        le=MAX_LAYERS,
    )
    weights: Floats = option(
        (), "Loss weight of each early exit; the final exit has weight 1.", shown="1 each"
    )
    weight_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant",
        "Schedule of the loss weights. linear, cosine: from initial_weights to weights.",
    )
    initial_weights: Floats = option(
        (),
        "Loss weight of each early exit in the first step. Requires a weight_schedule that is not "
        "constant.",
        shown="0 each",
    )
    schedule_steps: int = option(
        1000, "Length of the weight schedule, in steps.", gt=0, le=MAX_STEPS
    )
    temperatures: Floats = option((), "Divisor of the logits of each early exit.", shown="1 each")
    dynamic_token_weights: bool = option(
        False,
        "Multiply the loss of each token by the exit's largest probability (detached).",
    )
    deferred: bool = option(
        True,
        "Compute exit losses in the backward pass of their microbatch, so that a stage stores the "
        "logits of one exit at a time. Set it to false only for comparisons.",
    )

    @field_validator("boundaries", mode="before")
    @classmethod
    def _refuse_other_words(cls, given: Any) -> Any:
        if isinstance(given, str):  # Config replaces all.
            shown = toml.notation(given)
            raise ValueError(f"exits.boundaries: must be all or a list such as [2, 4], got {shown}")
        return given

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        boundaries = given.get("boundaries", ())
        count = len(boundaries) if isinstance(boundaries, list | tuple) else 0
        ones, zeros = (1.0,) * count, (0.0,) * count
        return fill(given, [("weights", ones), ("initial_weights", zeros), ("temperatures", ones)])


Schedule = Literal["1f1b", "zero-bubble", "zero-bubble-exits"]
Fills = int | Literal["auto"]
Engine = Literal["megatron", "deepspeed"]


class ParallelConfig(Section):
    """Distribution of the model over ranks; the remaining ranks are data parallel."""

    tensor: int = option(1, "Tensor-parallel size, in ranks.", gt=0, le=MAX_RANKS)
    pipeline: int = option(1, "Pipeline-parallel size, in ranks.", gt=0, le=MAX_RANKS)
    virtual: int = option(
        1,
        "Number of stages per pipeline rank; more than 1 interleaves them, which shrinks the "
        "bubble.",
        gt=0,
        le=MAX_RANKS,
    )
    schedule: Schedule = option(
        "1f1b",
        "Order of forward and backward passes. zero-bubble: ZB-H1, which computes the weight "
        "gradients of layers while a rank would otherwise be idle. zero-bubble-exits: also those "
        "of exits, which takes more memory.",
    )
    sequence: bool = option(
        False, "Sequence parallelism: split norms and dropout along the sequence over tensor ranks."
    )
    fill_warmup: Fills = option(
        0,
        "Number of additional microbatches that fill the idle time before the first backward pass "
        "and train the early exits on the first stages. auto: as many as fit without cost if all "
        "stages take the same time.",
    )
    fill_cooldown: Fills = option(
        0,
        "Number of additional microbatches that fill the idle time while the pipeline drains and "
        "train its last stages. auto: as many as fit without cost if all stages take the same "
        "time.",
    )
    forward_over_backward: float = option(
        0.5,
        "Ratio of a stage's forward time to its backward time, which determines how many "
        "microbatches fit for fill_warmup and fill_cooldown. Measure it with `ee-llm plan "
        "--profile`.",
        ge=1 / MAX_FACTOR,
        le=MAX_FACTOR,
    )
    layer_split: Integers = option(
        (),
        "Number of layers of each stage, from first to last: parallel.pipeline x parallel.virtual "
        "numbers. Stage s runs on pipeline rank s modulo parallel.pipeline.",
        shown="even",
    )
    engine: Engine = option(
        "megatron",
        "Library that reduces gradients over data-parallel ranks and updates parameters: "
        "megatron-core, or DeepSpeed's ZeRO (see deepspeed), which needs parallel.tensor = "
        "parallel.pipeline = 1.",
    )
    timeout_s: float = option(
        600.0,
        "Maximum time to wait for another rank, in seconds.",
        ge=MIN_TIMEOUT_S,
        le=MAX_TIMEOUT_S,
    )

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages over all processes."""
        return self.pipeline * self.virtual

    def data_size(self, world_size: int) -> int:
        """Return the data-parallel size for `world_size` processes; raises `ConfigError`."""
        model_size = self.tensor * self.pipeline
        if world_size < 1 or world_size % model_size:
            raise ConfigError(
                f"the number of processes, {world_size}, is not a multiple of parallel.tensor = "
                f"{self.tensor} x parallel.pipeline = {self.pipeline}. Start a multiple of "
                f"{model_size} (--nproc {model_size} on one machine) or change the layout."
            )
        return world_size // model_size


class DataConfig(Section):
    """Training data and how it is cut into sequences."""

    tokenizer: PathText = option(
        "bytes",
        "Tokenizer: 'bytes', or the path of a SentencePiece .model, a tokenizer.json, or a run "
        "directory or checkpoint, whose tokenizer is used.",
        min_length=1,
    )
    eos_token: str | None = option(
        None,
        "Text of the token that ends a document.",
        shown="from the files next to the tokenizer",
    )
    prefixes: PathTexts = option((), "Paths of prepared data, without the suffixes .bin and .idx.")
    weights: Floats = option(
        (), "Weight of each prefix in the data; normalized.", shown="proportional to size"
    )
    split: Annotated[tuple[float, float, float], BeforeValidator(list_to_tuple)] = option(
        (0.98, 0.02, 0.0),
        "Fractions of training, validation and test documents, which sum to 1. No command reads "
        "the test documents.",
    )
    seq_length: int = option(
        0, "Length of a training sequence, in tokens.", shown="model.max_seq_length"
    )
    mask_after_eos: bool = option(
        False,
        "Mask the loss where the input is an end-of-document token, because the next token belongs "
        "to an unrelated document.",
    )
    reset_positions: bool = option(False, "Restart positions at 0 after an end-of-document token.")


class OptimizerConfig(Section):
    """AdamW, its learning-rate schedule and gradient clipping."""

    lr: float = option(3e-4, "Maximum learning rate.", gt=0, le=MAX_RATE)
    min_lr: float = option(
        0.0,
        "Learning rate after the decay. Not allowed with a constant schedule.",
        ge=0,
        le=MAX_RATE,
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine",
        "Learning-rate schedule after the warm-up. wsd: constant, then a linear decay.",
    )
    warmup_steps: int = option(
        0, "Length of the linear warm-up from 0, in steps.", ge=0, le=MAX_STEPS
    )
    decay_steps: int | None = option(
        None,
        "Step after which the learning rate is min_lr. Not allowed with a constant schedule.",
        shown="training.steps",
        gt=0,
        le=MAX_STEPS,
    )
    wsd_decay_steps: int = option(
        0, "Length of the decay of a wsd schedule, in steps.", ge=0, le=MAX_STEPS
    )
    weight_decay: float = option(
        0.1, "Decoupled weight decay, not applied to norms and biases.", ge=0, le=MAX_RATE
    )
    beta1: float = option(0.9, "Adam's decay rate for the mean of gradients.", ge=0, lt=1)
    beta2: float = option(0.95, "Adam's decay rate for the mean of squared gradients.", ge=0, lt=1)
    eps: float = option(1e-8, "Adam's epsilon, which prevents division by zero.", gt=0, le=1)
    clip_grad: float = option(
        1.0, "Maximum global gradient norm; 0 disables clipping.", ge=0, le=MAX_FLOAT
    )


class TrainingConfig(Section):
    """Length, batch sizes and precision of training."""

    steps: int = option(1000, "Number of optimizer steps.", gt=0, le=MAX_STEPS)
    micro_batch_size: int = option(
        1,
        "Number of sequences per forward pass of one data-parallel rank.",
        gt=0,
        le=MAX_BATCH_SIZE,
    )
    global_batch_size: int = option(
        8, "Number of sequences per optimizer step, over all ranks.", gt=0, le=MAX_BATCH_SIZE
    )
    seed: int = option(
        1234, "Random seed of initialization, data order and dropout.", ge=0, le=MAX_SEED
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto",
        "Precision of forward and backward passes. auto: that of the checkpoint from which the run "
        "starts or resumes; else bfloat16 on a GPU, and on a CPU the faster of bfloat16 and "
        "float32. bfloat16 uses float32 master weights.",
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none",
        "Activations to recompute in the backward pass instead of storing them. selective: those "
        "of attention and of llama's MLPs. full: whole layers.",
    )
    eval_interval: int = option(
        100,
        "Number of steps between validations; 0 disables validation. Without validation, "
        "data.split needs no validation documents.",
        ge=0,
        le=MAX_STEPS,
    )
    eval_steps: int = option(10, "Number of global batches per validation.", gt=0, le=MAX_STEPS)
    max_bad_steps: int = option(
        10,
        "Number of consecutive steps with a NaN or infinite loss or gradient after which the run "
        "stops.",
        gt=0,
        le=MAX_STEPS,
    )


class CheckpointConfig(Section):
    """Saving, retention and loading of checkpoints."""

    interval: int = option(
        1000, "Number of steps between saves; 0 saves only at the end.", ge=0, le=MAX_STEPS
    )
    keep_last: int = option(3, "Number of checkpoints to keep; 0 keeps all.", ge=0, le=MAX_STEPS)
    resume: PathText = option(
        "auto",
        "Checkpoint to resume from. auto: the newest checkpoint in output, if any. never: none; "
        "start a new run. A path: that checkpoint, or the newest one that this run saved after "
        "starting from it.",
        min_length=1,
    )
    initial: PathText | None = option(
        None,
        "Checkpoint or run directory from which a new run takes its initial parameters. Its step, "
        "optimizer state and data position are ignored.",
        shown="none",
        min_length=1,
    )


class LoggingConfig(Section):
    """Intervals of reports, and where to report besides the console and log.jsonl."""

    interval: int = option(10, "Number of steps between reports.", gt=0, le=MAX_STEPS)
    trace_steps: Integers = option(
        (),
        "Steps (from 1) to trace. The times of their pipeline actions are written to "
        "trace-STEP.json in output, for chrome://tracing or Perfetto.",
        shown="none",
    )
    tensorboard: bool = option(False, "Write TensorBoard events to the run directory.")
    wandb_project: str | None = option(None, "Weights & Biases project to report to.", shown="none")
    wandb_mode: Literal["online", "offline", "disabled"] = option(
        "offline",
        "Mode of Weights & Biases: send records immediately, store them on disk, or do nothing.",
    )
