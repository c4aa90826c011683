"""`ee-llm data`: train tokenizers, tokenize or generate texts, and summarize prepared data."""

from dataclasses import replace
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse

_INPUTS = Group("Inputs", "suffixes key", "exclude format")

PREPARE = CommandHelp(
    "data prepare",
    "Tokenize texts into the files that training reads: PREFIX.bin and PREFIX.idx.",
    (
        Group("Tokenizer", "tokenizer", "eos_token append_eos"),
        _INPUTS,
        Group("Run", "workers", "progress"),
    ),
    (
        "ee-llm data prepare --inputs texts/ --output data/corpus --tokenizer data/tokenizer.model",
        "ee-llm data prepare --inputs a.jsonl b.jsonl.gz --output data/corpus --key content",
    ),
)
TRAIN_TOKENIZER = CommandHelp(
    "data train-tokenizer",
    "Train a SentencePiece tokenizer (byte-pair encoding with byte fallback) on texts.",
    (Group("Tokenizer", "vocab_size max_megabytes"), _INPUTS),
    (
        "ee-llm data train-tokenizer --inputs texts/ --output data/tokenizer.model "
        "--vocab-size 4096",
        "ee-llm data train-tokenizer --inputs src/ --suffixes .py .md --output data/code.model",
    ),
)
GENERATE = CommandHelp(
    "data generate",
    """Sample texts from a model, and write their exact tokens as the files that training reads:
    PREFIX.bin and PREFIX.idx. Use them to tune, calibrate or evaluate the model's own exits.

    Every token is sampled from the full model, without early exits. Except for rounding, the
    files depend on --seed but not on --max-num-seqs.""",
    (
        Group("Text", "num_tokens prompts max_tokens", "bos parse_special chat_template"),
        Group("Sampling", "temperature top_p seed", "top_k min_p"),
        Group(
            "Execution",
            "dtype max_num_seqs tensor pipeline",
            "cache_tokens quantize attention cuda_graphs compile timeout_s",
        ),
        Group("Output", "jsonl json", "progress"),
    ),
    (
        "ee-llm data generate --checkpoint runs/llama --output data/own --num-tokens 100000",
        "ee-llm data generate --checkpoint runs/chat --output data/chats --prompts chats.jsonl",
    ),
)
STATS = CommandHelp(
    "data stats",
    "Print the size of prepared data, and the entropy of its tokens.",
    (),
    ("ee-llm data stats --prefix data/corpus",),
)


def run_prepare(arguments: list[str]) -> None:
    """Run `ee-llm data prepare`."""
    from ee_llm.data.prepare import PrepareOptions, prepare

    options = parse(PrepareOptions, PREPARE, arguments)
    if Path(options.tokenizer).is_dir():  # It may be a checkpoint, which requires torch to read.
        from ee_llm.checkpoint.describe import tokenizer_spec

        options = replace(options, tokenizer=tokenizer_spec(options.tokenizer))
    print(prepare(options))


def run_train_tokenizer(arguments: list[str]) -> None:
    """Run `ee-llm data train-tokenizer`."""
    from ee_llm.data.tokenization.train_tokenizer import TrainTokenizerOptions, train_tokenizer

    print(train_tokenizer(parse(TrainTokenizerOptions, TRAIN_TOKENIZER, arguments)))


def run_generate(arguments: list[str]) -> None:
    """Run `ee-llm data generate`, on several ranks with --tensor or --pipeline."""
    from ee_llm.cli.generation.options import DataGenerateOptions

    options = parse(DataGenerateOptions, GENERATE, arguments)
    from ee_llm.cli.generation.data import check, generate_data
    from ee_llm.launch.local import launch, must_launch

    num_ranks = options.tensor * options.pipeline
    if must_launch(num_ranks):
        check(options)
        launch(num_ranks, [*GENERATE.command.split(), *arguments])
    else:
        generate_data(options)


def run_stats(arguments: list[str]) -> None:
    """Run `ee-llm data stats`."""
    from ee_llm.data.statistics import StatisticsOptions, statistics

    print(statistics(parse(StatisticsOptions, STATS, arguments)))
