"""`ee-llm checkpoint add-exits`: write a checkpoint with more exits."""

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.checkpoint.options import AddExitsOptions
from ee_llm.config import Config
from ee_llm.config.limits import MAX_TIMEOUT_S, MIN_TIMEOUT_S
from ee_llm.errors import UserError
from ee_llm.launch.local import launch, must_launch

COMMAND = CommandHelp(
    "checkpoint add-exits",
    "Add exits to a checkpoint. All other tensors, including the optimizer's state, stay the same "
    "bit for bit.",
    (
        Group("New exits", "head exit_output initialization"),
        Group(
            "Initialization from data", "data", "num_tokens seq_length tensor pipeline timeout_s"
        ),
        Group("Output", "json"),
    ),
    (
        "ee-llm checkpoint add-exits runs/llama --exits 8,16 --output runs/with-exits",
        "ee-llm checkpoint add-exits runs/llama --exits 8 16 --output runs/with-exits "
        "--initialization least-squares --data data/corpus --num-tokens 100000",
    ),
)

_FROM_DATA = ("class-aware", "least-squares")
_DEFAULTS = {"data": (), "num_tokens": None, "seq_length": None, "tensor": 1, "pipeline": 1}
"""Options that only an initialization from data uses, with their defaults."""


def run_add_exits(arguments: list[str]) -> None:
    """Run `ee-llm checkpoint add-exits`, on several ranks with --tensor or --pipeline."""
    options = parse(AddExitsOptions, COMMAND, arguments, ("checkpoint",))
    config = check_add_exits(options)
    num_ranks = options.tensor * options.pipeline
    if must_launch(num_ranks):
        launch(num_ranks, [*COMMAND.command.split(), *arguments])
        return
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.exits import added
    from ee_llm.cli.checkpoint.rewriting import write

    if options.initialization in _FROM_DATA:
        _add_from_data(options, config)
        return
    rewrite = added(TensorReader(options.checkpoint), config, options.initialization)
    write(rewrite, options.output, as_json=options.json)


def check_add_exits(options: AddExitsOptions) -> Config:
    """Return the configuration with the new exits, before any rank is started.

    Raises UserError for options that contradict each other or the checkpoint.
    """
    from ee_llm.checkpoint import directory
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.exits import config_with

    reader = TensorReader(options.checkpoint)
    method = options.initialization
    head, output = options.head, options.exit_output
    if not reader.config().exits.boundaries:
        output = output or ("own" if method == "class-aware" else "shared")
        if head is None and method == "least-squares":
            head = ("translator", "norm")
    config = config_with(reader, options.exits, head, output)
    if not MIN_TIMEOUT_S <= options.timeout_s <= MAX_TIMEOUT_S:
        raise UserError(
            f"--timeout-s {options.timeout_s} is out of range. Use {MIN_TIMEOUT_S} to "
            f"{MAX_TIMEOUT_S:,.0f} seconds."
        )
    if method not in _FROM_DATA:
        for name, default in _DEFAULTS.items():
            if getattr(options, name) != default:
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --initialization {method}. "
                    "Leave it out, or use --initialization least-squares or class-aware."
                )
        return config
    if method == "least-squares" and not {"translator", "norm"} <= set(config.exits.head):
        remedy = "Use --head translator norm, or --initialization copy."
        if existing := reader.config().exits.boundaries:
            remedy = (
                "All exits must be alike, so first remove the others with 'ee-llm checkpoint"
                f" remove-exits --exits {' '.join(map(str, existing))}', or use --initialization"
                " copy."
            )
        raise UserError(
            "--initialization least-squares computes translators, which a norm must follow, but "
            f"the head of these exits is {' '.join(config.exits.head) or 'empty'}. {remedy}"
        )
    is_tied = config.exits.output == "tied" and not config.model.tie_embeddings
    if method == "least-squares" and is_tied:
        raise UserError(
            "--initialization least-squares approximates the input of the final exit's output "
            "weight, but these exits use the embedding instead (exits.output = tied, "
            "model.tie_embeddings = false). Use --exit-output shared, or --initialization copy."
        )
    if method == "class-aware" and options.pipeline != 1:
        raise UserError(
            f"--pipeline {options.pipeline} does not work with --initialization class-aware. Use "
            "--tensor."
        )
    if method == "class-aware" and config.exits.output != "own":
        raise UserError(
            "--initialization class-aware computes output weights, but these exits do not have "
            f"their own (exits.output = {config.exits.output}). Use --exit-output own, or "
            "--initialization copy."
        )
    if not options.data:
        raise UserError(
            f"--initialization {method} needs data. Give --data with the prefixes of data that "
            "'ee-llm data prepare' wrote."
        )
    num_kv_heads = config.model.num_kv_heads
    if options.tensor < 1 or num_kv_heads % options.tensor:
        divisors = [str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
        raise UserError(
            f"--tensor {options.tensor} does not divide num_kv_heads = {num_kv_heads}. Use one of "
            f"{', '.join(divisors)}."
        )
    num_layers = config.model.num_layers
    if not 1 <= options.pipeline <= num_layers:
        raise UserError(
            f"--pipeline {options.pipeline} is out of range. Use 1 to {num_layers}, the number of "
            "layers."
        )
    longest = config.model.max_seq_length
    if options.seq_length is not None and not 1 <= options.seq_length <= longest:
        raise UserError(
            f"--seq-length {options.seq_length} is out of range. Use 1 to {longest} "
            "(model.max_seq_length)."
        )
    directory.refuse_used(options.output)  # before the model runs
    return config


def _add_from_data(options: AddExitsOptions, config: Config) -> None:
    """Write the checkpoint with parameters that are computed from data; rank 0 writes."""
    from ee_llm import distributed
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.exits import added
    from ee_llm.cli.checkpoint.rewriting import progress, write
    from ee_llm.data.tokenization.tokenizer import load_tokenizer
    from ee_llm.data.windows import Windows, default_length
    from ee_llm.inference.exits.class_means import class_means
    from ee_llm.inference.exits.least_squares import least_squares

    reader = TensorReader(options.checkpoint)
    ranks = None
    if options.tensor * options.pipeline > 1:
        ranks = distributed.connect_serving(
            tensor=options.tensor, pipeline=options.pipeline, timeout_s=options.timeout_s
        )
    seq_length = options.seq_length or default_length(config)
    windows = Windows(options.data, seq_length, options.num_tokens)
    notes: list[str] = []
    with progress("reading data", windows.num_tokens, is_quiet=options.json) as advance:
        if options.initialization == "least-squares":
            computed = least_squares(reader, config, options.exits, windows, ranks, advance)
            notes.append(f"least-squares: {windows.num_tokens:,} tokens")
            hidden_size = config.model.hidden_size
            if windows.num_tokens < (enough := 10 * (hidden_size + 1)):
                notes.append(
                    f"{windows.num_tokens:,} tokens are few for hidden_size = {hidden_size}. Use "
                    f"{enough:,} or more."
                )
        else:
            eos_token_id = load_tokenizer(reader.tokenizer(), config.data.eos_token).eos_token_id
            means = class_means(
                reader, config, options.exits, windows, eos_token_id, ranks, advance
            )
            computed = {f"exits.{b}.output.weight": weight for b, weight in means.weights.items()}
            vocab_size = config.model.vocab_size
            notes.append(
                f"class-aware: {means.num_tokens:,} tokens; {vocab_size - means.num_seen:,} of the "
                f"vocabulary's {vocab_size:,} do not occur and have the rows of the final exit"
            )
    if distributed.is_rank_zero():
        rewrite = added(reader, config, options.initialization, computed)
        rewrite.notes += notes
        write(rewrite, options.output, as_json=options.json)
    if ranks is not None:
        ranks.shutdown()
