"""The sections of the configuration but for the model's, one documented field per option."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

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
    MAX_RANKS,
    MAX_RATE,
    MAX_SEED,
    MAX_STEPS,
    MAX_TIMEOUT_S,
    MIN_TIMEOUT_S,
)
from ee_llm.errors import ConfigError

HeadPart = Literal["block", "mlp", "norm"]


class ExitsConfig(Section):
    """The early exits: where they are, what they are made of, how their losses weigh."""

    boundaries: Integers = option(
        (),
        "Where the exits are: exit b reads the residual stream after layer b, 1 <= b < num_layers, "
        "in increasing order.",
    )
    placement: Literal["post", "pre"] = option(
        "post",
        "Pipeline stage of an exit at boundary b: post is the stage of layer b, pre that of layer "
        "b+1. The function is the same; memory and time differ.",
    )
    head: Annotated[tuple[HeadPart, ...], BeforeValidator(list_to_tuple)] = option(
        ("norm",),
        "Parts between the boundary and the output projection, in this order: block (a "
        "transformer layer), mlp, norm.",
    )
    output: Literal["tied", "shared", "own"] = option(
        "shared",
        "Output weight of the exits: tied to the word embedding, shared with the final exit, or "
        "own (one each).",
    )
    initialization: Literal["copy", "random"] = option(
        "copy",
        "What exits begin with that tuning.checkpoint or checkpoint.initial lacks. copy: the final "
        "norm and output weight, the layer's own MLP, the next layer as block. random: as drawn.",
    )
    weights: Floats = option(
        (), "Weight of each exit's loss; the final exit's is 1.", shown="1 each"
    )
    weight_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "How the weights move from initial_weights to weights."
    )
    initial_weights: Floats = option(
        (), "Weight of each exit's loss at step 0, unless the schedule is constant.", shown="0 each"
    )
    schedule_steps: int = option(
        1000, "Length of the weight schedule, in steps.", gt=0, le=MAX_STEPS
    )
    temperatures: Floats = option(
        (), "Each exit's logits are divided by its temperature.", shown="1 each"
    )
    dynamic_token_weights: bool = option(
        False,
        "Whether a token's exit loss is multiplied by the exit's own top probability (detached).",
    )
    deferred: bool = option(
        True,
        "Whether exit losses are computed in the backward pass of their microbatch, which keeps "
        "the logits of one microbatch at a time. false is for comparison.",
    )

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
    """How the model is spread over processes; what is left over is data parallel."""

    tensor: int = option(1, "Tensor-parallel size, in processes.", gt=0, le=MAX_RANKS)
    pipeline: int = option(1, "Pipeline-parallel size, in processes.", gt=0, le=MAX_RANKS)
    virtual: int = option(
        1,
        "Stages of each pipeline process; more than 1 interleaves them, for a smaller bubble.",
        gt=0,
        le=MAX_RANKS,
    )
    schedule: Schedule = option(
        "1f1b",
        "Order of forward and backward passes. zero-bubble: ZB-H1, layers' weight gradients are "
        "computed while a process would wait; zero-bubble-exits: exits' too, which takes memory.",
    )
    sequence: bool = option(
        False, "Whether norms and dropout are split along the sequence over the tensor ranks."
    )
    fill_warmup: Fills = option(
        0,
        "Further microbatches that fill the wait for the first gradient and train early exits on "
        "the first stages. auto: as many as fit into equal stages.",
    )
    fill_cooldown: Fills = option(
        0,
        "Further microbatches that fill the drain of the pipeline and train its last stages. auto: "
        "as many as fit into equal stages.",
    )
    forward_over_backward: float = option(
        0.5,
        "Forward time of a stage over its backward time, which decides how many fit; `ee-llm plan "
        "--profile` measures it.",
        ge=1 / MAX_FACTOR,
        le=MAX_FACTOR,
    )
    layer_split: Integers = option(
        (),
        "Number of layers of each stage, first to last: parallel.pipeline x parallel.virtual "
        "numbers; stage s is on pipeline process s modulo parallel.pipeline.",
        shown="even",
    )
    engine: Engine = option(
        "megatron",
        "What sums gradients over data-parallel processes and updates parameters: megatron-core, "
        "or DeepSpeed's ZeRO (see deepspeed), which needs parallel.tensor = parallel.pipeline = 1.",
    )
    timeout_s: float = option(
        600.0,
        "Time-out of any wait for another process, in seconds.",
        ge=MIN_TIMEOUT_S,
        le=MAX_TIMEOUT_S,
    )

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all processes."""
        return self.pipeline * self.virtual

    def data_size(self, world_size: int) -> int:
        """The data-parallel size for `world_size` processes; raises `ConfigError`."""
        model_size = self.tensor * self.pipeline
        if world_size < 1 or world_size % model_size:
            raise ConfigError(
                f"the number of processes, {world_size}, is not a multiple of parallel.tensor = "
                f"{self.tensor} x parallel.pipeline = {self.pipeline}; start a multiple of "
                f"{model_size} (--nproc {model_size} on one machine) or change the layout"
            )
        return world_size // model_size


class DataConfig(Section):
    """What is read, and how it is cut into sequences."""

    tokenizer: PathText = option(
        "bytes",
        "'bytes', or the path of a SentencePiece .model, of a tokenizer.json, or of a run "
        "directory or checkpoint, whose tokenizer it then is.",
        min_length=1,
    )
    eos_token: str | None = option(
        None,
        "Text of the token that ends a document.",
        shown="what the files beside the tokenizer state",
    )
    prefixes: PathTexts = option(
        (), "Paths of prepared data (the common part of a .bin and .idx pair)."
    )
    weights: Floats = option(
        (), "Share of each prefix in the blend; normalized.", shown="in proportion to size"
    )
    split: Annotated[tuple[float, float, float], BeforeValidator(list_to_tuple)] = option(
        (0.98, 0.02, 0.0), "Fractions of training, validation and test data; they add up to 1."
    )
    seq_length: int = option(
        0, "Length of a training sequence, in tokens.", shown="model.max_seq_length"
    )
    mask_after_eos: bool = option(
        False,
        "Whether there is no loss where the input is an end-of-document token, which would have to "
        "predict the beginning of an unrelated document.",
    )
    reset_positions: bool = option(
        False, "Whether positions start again at 0 after an end-of-document token."
    )


class OptimizerConfig(Section):
    """AdamW, its learning rate over time, and clipping."""

    lr: float = option(3e-4, "Highest learning rate.", gt=0, le=MAX_RATE)
    min_lr: float = option(
        0.0,
        "Learning rate after the last step of the schedule, unless it is constant.",
        ge=0,
        le=MAX_RATE,
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine",
        "Course of the learning rate after warm-up; wsd is constant, then decays at the end.",
    )
    warmup_steps: int = option(0, "Linear warm-up from 0, in steps.", ge=0, le=MAX_STEPS)
    decay_steps: int | None = option(
        None,
        "Step after which the rate is min_lr, unless the schedule is constant.",
        shown="training.steps",
        gt=0,
        le=MAX_STEPS,
    )
    wsd_decay_steps: int = option(
        0, "Length of the decay at the end of a wsd schedule, in steps.", ge=0, le=MAX_STEPS
    )
    weight_decay: float = option(
        0.1, "Decoupled weight decay; norms and biases have none.", ge=0, le=MAX_RATE
    )
    beta1: float = option(0.9, "Adam's decay of the gradient's mean, per step.", ge=0, lt=1)
    beta2: float = option(0.95, "Adam's decay of the gradient's square, per step.", ge=0, lt=1)
    eps: float = option(1e-8, "Adam's term against division by zero.", gt=0, le=1)
    clip_grad: float = option(
        1.0, "Largest global gradient norm; 0 is no clipping.", ge=0, le=MAX_FLOAT
    )


class TrainingConfig(Section):
    """How long, in what portions and in what precision to train."""

    steps: int = option(1000, "Number of optimizer steps.", gt=0, le=MAX_STEPS)
    micro_batch_size: int = option(
        1, "Sequences in one forward pass of one data-parallel rank.", gt=0, le=MAX_BATCH_SIZE
    )
    global_batch_size: int = option(
        8, "Sequences in one optimizer step, over all ranks.", gt=0, le=MAX_BATCH_SIZE
    )
    seed: int = option(1234, "Seed of initialization, data order and dropout.", ge=0, le=MAX_SEED)
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto",
        "Precision of forward and backward passes; auto is bfloat16 on a GPU, on a CPU the faster "
        "of bfloat16 and float32. Master weights of bfloat16 are float32.",
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none",
        "Activations computed again in the backward pass instead of being kept: none, those of "
        "attention (and of llama's MLPs), or whole layers.",
    )
    eval_interval: int = option(
        100,
        "Steps between validations; 0 is none, and needs no share of data.split.",
        ge=0,
        le=MAX_STEPS,
    )
    eval_steps: int = option(10, "Global batches in one validation.", gt=0, le=MAX_STEPS)
    max_bad_steps: int = option(
        10,
        "Steps in a row with a NaN or infinite loss or gradient after which to stop.",
        gt=0,
        le=MAX_STEPS,
    )


class CheckpointConfig(Section):
    """When to save, what to keep, what to start from."""

    interval: int = option(
        1000, "Steps between saves; 0 saves at the end only.", ge=0, le=MAX_STEPS
    )
    keep_last: int = option(3, "Number of checkpoints to keep; 0 keeps all.", ge=0, le=MAX_STEPS)
    resume: PathText = option(
        "auto",
        "auto goes on from the newest checkpoint in output if there is one, never starts afresh, "
        "and a path goes on from that checkpoint; started again, from what the run saved since.",
        min_length=1,
    )
    initial: PathText | None = option(
        None,
        "Checkpoint, or run directory, with the parameters that a new run begins with; its steps, "
        "optimizer and place in the data are the run's own.",
        shown="none",
        min_length=1,
    )


class LoggingConfig(Section):
    """What is reported where; the console and log.jsonl always are."""

    interval: int = option(10, "Steps between reports.", gt=0, le=MAX_STEPS)
    trace_steps: Integers = option(
        (),
        "Steps (from 1) whose pipeline actions are written with their times to "
        "output/trace-STEP.json, to be seen with chrome://tracing or Perfetto.",
        shown="none",
    )
    tensorboard: bool = option(False, "Whether to write TensorBoard events below output.")
    wandb_project: str | None = option(None, "Weights & Biases project to report to.", shown="none")
    wandb_mode: Literal["online", "offline", "disabled"] = option(
        "offline", "Whether W&B sends its records at once, keeps them on disk, or does nothing."
    )
