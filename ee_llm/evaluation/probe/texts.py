"""The windows that the exits are fitted to, and those that test them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from ee_llm.data.tokenization.tokenizer import Tokenizer
from ee_llm.errors import DataError
from ee_llm.evaluation.options import InputOptions
from ee_llm.evaluation.probe.options import DEFAULT_NUM_TOKENS, ProbeOptions, enough_tokens
from ee_llm.evaluation.text_pass import open_windows

_FIT_TOKENS_PER_UNKNOWN = 20


@dataclass(frozen=True)
class Texts:
    """Windows of token ids, int64 [t + 1] each.

    Attributes:
        fit: The windows that the exits are fitted to.
        test: The windows that test them.
    """

    fit: Sequence[Tensor]
    test: Sequence[Tensor]

    @property
    def num_fit_tokens(self) -> int:
        """Number of tokens that the model predicts in `fit`."""
        return _num_predicted(self.fit)

    @property
    def num_test_tokens(self) -> int:
        """Number of tokens that the model predicts in `test`."""
        return _num_predicted(self.test)


def read_texts(
    options: ProbeOptions, tokenizer: Tokenizer, seq_length: int, hidden_size: int
) -> Texts:
    """Return the windows of the fit and of the test, which have no window in common.

    Args:
        options: The options.
        tokenizer: The checkpoint's tokenizer.
        seq_length: Greatest number of predicted tokens in a window.
        hidden_size: Size of the residual stream.

    Raises:
        DataError: A text cannot be read or is too short.
    """
    num_test = options.num_tokens or DEFAULT_NUM_TOKENS
    wanted = options.num_fit_tokens or _FIT_TOKENS_PER_UNKNOWN * (hidden_size + 1)
    whole = -(-wanted // seq_length) * seq_length
    if options.fit_data:
        source = InputOptions(options.checkpoint, options.fit_data)
        fit = list(open_windows(source, tokenizer, seq_length, whole))
        test = list(open_windows(options, tokenizer, seq_length, num_test))
    else:
        windows = list(open_windows(options, tokenizer, seq_length, whole + num_test))
        total = _num_predicted(windows)
        if options.num_fit_tokens is None:
            wanted = min(wanted, total // 2)
        before = [0, *accumulate(len(window) - 1 for window in windows)]
        num_windows = sum(count < wanted for count in before[:-1])
        fit, test = windows[:num_windows], windows[num_windows:]
        if not test:
            raise DataError(
                f"the text has {total:,} tokens, and the least-squares fit takes all of them in"
                f" windows of {seq_length:,}. Give more text, a smaller num_fit_tokens, a shorter"
                " seq_length, or other text for the fit with fit_data."
            )
    texts = Texts(fit, test)
    if texts.num_fit_tokens < (needed := hidden_size + 1):
        raise DataError(
            f"{texts.num_fit_tokens:,} tokens are too few for the least-squares fit with"
            f" hidden_size = {hidden_size:,}: at least {needed:,} are needed, and"
            f" {enough_tokens(hidden_size):,} or more are better. Give more text, a larger"
            " num_fit_tokens, or other text for the fit with fit_data."
        )
    return texts


def _num_predicted(windows: Sequence[Tensor]) -> int:
    return sum(len(window) - 1 for window in windows)
