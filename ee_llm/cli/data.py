"""`ee-llm data`: train tokenizers, tokenize texts, and summarize prepared data."""

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


def run_stats(arguments: list[str]) -> None:
    """Run `ee-llm data stats`."""
    from ee_llm.data.statistics import StatisticsOptions, statistics

    print(statistics(parse(StatisticsOptions, STATS, arguments)))
