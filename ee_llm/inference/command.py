"""`ee-llm generate`: one prompt in, its continuation out, with the exit of every token."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from ee_llm import platform
from ee_llm.checkpoint.read import TensorReader
from ee_llm.data.tokenizer import load_tokenizer
from ee_llm.inference.generator import Decision, generate_reference
from ee_llm.inference.policy import Measure, make_policy
from ee_llm.inference.reference import load_reference
from ee_llm.inference.render import as_json, colored_text, legend, token_pieces, token_table
from ee_llm.inference.request import Strategy
from ee_llm.inference.sampling import Sampling


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt with a trained model and show at which exit each token left."""

    checkpoint: Path
    """Checkpoint directory, or the run directory that holds it (then its newest one)."""

    prompt: str | None = None
    """The text to continue. Without it and --prompt-file, standard input is read."""

    prompt_file: Path | None = None
    """File whose text is continued, to its last character. '-' is standard input."""

    thresholds: tuple[float | Literal["off"], ...] = (0.8,)
    """Confidence at which a token leaves, in (0, 1], or off: one per exit, or one for all."""

    measure: Measure = "max_probability"
    """What confidence is: the top token's probability, 1 - normalized entropy, or top-1 - top-2."""

    strategy: Strategy = "exact"
    """exact leaves at the first confident exit; propagate, too, and freezes the row there; full and
    verify run every token through all layers."""

    max_new_tokens: int = 64
    """Number of tokens after which to stop; end of document stops too."""

    temperature: float = 0.0
    """Divides the logits before drawing; 0 takes the most probable token (greedy)."""

    top_k: int = 0
    """Draw from this many most probable tokens only; 0 is all."""

    top_p: float = 1.0
    """Draw from the fewest most probable tokens that hold this share of the probability."""

    min_p: float = 0.0
    """Draw only from tokens with at least this share of the top token's probability; 0 is all."""

    repetition_penalty: float = 1.0
    """Divides positive logits of tokens already seen and multiplies negative ones; 1 is off."""

    seed: int = 0
    """Seed of the draws; the same seed gives the same text."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision to compute in."""

    show_confidence: bool = False
    """Also print a table with the exit, confidence and log probability of each token."""

    json: bool = False
    """Print one JSON object and nothing else."""


def generate(options: GenerateOptions) -> None:
    """Print the continuation of a prompt to standard output; raises ValueError for bad input."""
    sampling = Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        options.min_p,
        options.repetition_penalty,
    )
    prompt = _prompt(options)
    reader = TensorReader(options.checkpoint)
    tokenizer = load_tokenizer(reader.tokenizer())
    model = load_reference(reader, platform.DTYPES[options.dtype], platform.device())
    thresholds = [None if value == "off" else value for value in options.thresholds]
    policy = make_policy(model.config.exits.boundaries, thresholds, options.measure)
    with platform.console.status("generating") as status:  # on standard error, at a terminal only
        generation = generate_reference(
            model,
            tokenizer.encode(prompt),
            policy,
            sampling,
            options.strategy,
            options.max_new_tokens,
            tokenizer.eod,
            on_token=_counter(status.update, options.max_new_tokens),
        )

    def decode(tokens: list[int]) -> str:
        # The embedding may have more rows than the tokenizer has tokens.
        return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])

    pieces = token_pieces(decode, generation.prompt, generation.tokens)
    if options.json:
        print(as_json(prompt, pieces, generation, model.num_layers))
        return
    console = Console(highlight=False)
    console.print(colored_text(prompt, pieces, generation, model.num_layers), soft_wrap=True)
    if options.show_confidence:
        console.print(token_table(pieces, generation, model.num_layers))
    console.rule()
    console.print(legend(generation, model.num_layers), soft_wrap=True)


def _counter(show: Callable[[str], None], total: int) -> Callable[[Decision], None]:
    count = 0

    def on_token(_: Decision) -> None:
        nonlocal count
        count += 1
        show(f"generating: {count} of {total} tokens")

    return on_token


def _prompt(options: GenerateOptions) -> str:
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; leave one out")
    if options.prompt is not None:
        source, data = "--prompt", options.prompt.encode(errors="surrogateescape")
    elif options.prompt_file is not None and str(options.prompt_file) != "-":
        source = f"--prompt-file {options.prompt_file}"
        try:
            data = options.prompt_file.read_bytes()
        except OSError as error:
            raise ValueError(f"{source} can not be read: {error.strerror}") from error
    else:
        if sys.stdin.isatty():
            raise ValueError("no prompt; give --prompt TEXT, --prompt-file FILE or standard input")
        source, data = "standard input", sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 at byte {error.start}; convert it first"
        ) from error
    if not text:
        raise ValueError(f"{source} is empty; the prompt needs at least one character")
    return text
