"""Open the training and validation data of a configuration for one rank."""

from ee_llm import distributed
from ee_llm.checkpoint.tokenizer import keep
from ee_llm.config import Config
from ee_llm.data.batches import BatchShape, EvaluationBatches, TrainingBatches
from ee_llm.data.dataset import Blend, RowOptions, Split, open_blend
from ee_llm.data.prepare import check_tokenizer
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from ee_llm.errors import UserError
from ee_llm.pipeline.selection import select_fills


def open_data(
    config: Config, grid: distributed.Grid
) -> tuple[TrainingBatches, EvaluationBatches | None]:
    """Return this rank's training data, and its validation data if the run validates.

    Raises:
        UserError: The tokenizer or the data do not fit the configuration, or cannot be read.
    """
    keep(config.data.tokenizer)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos_token)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of "
            f"data.tokenizer {config.data.tokenizer!r}, which has {tokenizer.vocab_size} tokens. "
            f"Set it to {tokenizer.vocab_size} or more."
        )
    for prefix in config.data.prefixes:
        check_tokenizer(prefix, tokenizer)
    options = RowOptions(
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=config.model.vocab_size,
        mask_after_eos=config.data.mask_after_eos,
        reset_positions=config.data.reset_positions,
    )
    micro_batch_size = config.training.micro_batch_size
    filling = sum(select_fills(config)) * micro_batch_size * grid.data_size

    def shape(global_batch_size: int) -> BatchShape:
        return BatchShape(micro_batch_size, global_batch_size, grid.data_rank, grid.data_size)

    def blend(split: Split) -> Blend:
        return open_blend(
            config.data.prefixes,
            split,
            seq_length=config.data.seq_length,
            options=options,
            seed=config.training.seed,
            weights=config.data.weights,
            fractions=config.data.split,
        )

    # Microbatches that fill bubbles take further samples in the same order, so that no sample is
    # repeated or skipped.
    training = TrainingBatches(blend("train"), shape(config.training.global_batch_size + filling))
    if not config.validates:
        return training, None
    validation = shape(config.training.global_batch_size)
    return training, EvaluationBatches(blend("validation"), validation, config.training.eval_steps)
