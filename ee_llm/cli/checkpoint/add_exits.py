"""`ee-llm checkpoint add-exits`: write a checkpoint with more exits."""

import os

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.checkpoint.options import AddExitsOptions
from ee_llm.config import Config
from ee_llm.config.limits import MAX_TIMEOUT_S, MIN_TIMEOUT_S
from ee_llm.errors import UserError
from ee_llm.launch.local import launch

COMMAND = CommandHelp(
    "checkpoint add-exits",
    "Add exits to a checkpoint. All other tensors, including the optimizer's state, stay the same "
    "bit for bit.",
    (
        Group("New exits", "head exit_output initialization"),
        Group("Class-aware initialization", "data", "num_tokens seq_length tensor timeout_s"),
        Group("Output", "json"),
    ),
    (
        "ee-llm checkpoint add-exits runs/llama --exits 8,16 --output runs/with-exits",
        "ee-llm checkpoint add-exits runs/llama --exits 8 16 --output runs/with-exits "
        "--initialization class-aware --data data/corpus",
    ),
)

_MAX_SEQ_LENGTH = 2048  # tokens, unless --seq-length is given, because attention is quadratic
_FOR_CLASS_AWARE = {"data": (), "num_tokens": None, "seq_length": None, "tensor": 1}


def run_add_exits(arguments: list[str]) -> None:
    """Run `ee-llm checkpoint add-exits`, on several ranks with --tensor."""
    options = parse(AddExitsOptions, COMMAND, arguments, ("checkpoint",))
    config = check_add_exits(options)
    if options.tensor > 1 and "WORLD_SIZE" not in os.environ:
        launch(options.tensor, [*COMMAND.command.split(), *arguments])
        return
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.exits import added
    from ee_llm.cli.checkpoint.rewriting import write

    if options.initialization == "class-aware":
        _add_class_aware(options, config)
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
    is_class_aware = options.initialization == "class-aware"
    output = options.exit_output
    if output is None and not reader.config().exits.boundaries:
        output = "own" if is_class_aware else "shared"
    config = config_with(reader, options.exits, options.head, output)
    if not MIN_TIMEOUT_S <= options.timeout_s <= MAX_TIMEOUT_S:
        raise UserError(
            f"--timeout-s {options.timeout_s} is out of range. Use {MIN_TIMEOUT_S} to "
            f"{MAX_TIMEOUT_S:,.0f} seconds."
        )
    if not is_class_aware:
        for name, default in _FOR_CLASS_AWARE.items():
            if getattr(options, name) != default:
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --initialization "
                    f"{options.initialization}. Remove it, or use --initialization class-aware."
                )
        return config
    if config.exits.output != "own":
        raise UserError(
            "--initialization class-aware computes output weights, but these exits do not have "
            f"their own (exits.output = {config.exits.output}). Use --exit-output own, or "
            "--initialization copy."
        )
    if not options.data:
        raise UserError(
            "--initialization class-aware needs data. Give --data with the prefixes of data that "
            "'ee-llm data prepare' wrote."
        )
    num_kv_heads = config.model.num_kv_heads
    if options.tensor < 1 or num_kv_heads % options.tensor:
        divisors = [str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
        raise UserError(
            f"--tensor {options.tensor} does not divide num_kv_heads = {num_kv_heads}. Use one of "
            f"{', '.join(divisors)}."
        )
    longest = config.model.max_seq_length
    if options.seq_length is not None and not 1 <= options.seq_length <= longest:
        raise UserError(
            f"--seq-length {options.seq_length} is out of range. Use 1 to {longest} "
            "(model.max_seq_length)."
        )
    directory.refuse_used(options.output)  # before the model runs
    return config


def _add_class_aware(options: AddExitsOptions, config: Config) -> None:
    """Write the checkpoint with output weights that are class means; rank 0 writes."""
    from ee_llm import distributed
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.exits import added
    from ee_llm.cli.checkpoint.rewriting import progress, write
    from ee_llm.data.tokenization.tokenizer import load_tokenizer
    from ee_llm.data.windows import Windows
    from ee_llm.inference.exits.class_means import class_means

    reader = TensorReader(options.checkpoint)
    ranks = None
    if options.tensor > 1:
        ranks = distributed.connect_serving(tensor=options.tensor, timeout_s=options.timeout_s)
    seq_length = options.seq_length or min(config.data.seq_length, _MAX_SEQ_LENGTH)
    windows = Windows(options.data, seq_length, options.num_tokens)
    eos_token_id = load_tokenizer(reader.tokenizer(), config.data.eos_token).eos_token_id
    with progress("reading data", windows.num_tokens, is_quiet=options.json) as advance:
        means = class_means(reader, config, options.exits, windows, eos_token_id, ranks, advance)
    if distributed.is_rank_zero():
        rewrite = added(reader, config, "class-aware", means.weights)
        vocab_size = config.model.vocab_size
        rewrite.notes.append(
            f"class-aware: {means.num_tokens:,} tokens; {vocab_size - means.num_seen:,} of the "
            f"vocabulary's {vocab_size:,} do not occur and have the rows of the final exit"
        )
        write(rewrite, options.output, as_json=options.json)
    if ranks is not None:
        ranks.shutdown()
