"""Questions with answers as windows of text, to calibrate exits for a task.

Greedy decoding gives an answer exactly if, at each of its tokens, the most probable next token
after the question and the answer so far is that token. One teacher-forced pass therefore tells
which exits would have answered right.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ee_llm.data.tokenization.tokenizer import Tokenizer
from ee_llm.data.windows import TargetWindow
from ee_llm.errors import DataError
from ee_llm.inference.text.prompt_encoder import PromptEncoder


class TaskWindows:
    """The questions of JSON Lines files, each with its answer as a window.

    Attributes:
        num_tokens: Number of tokens of all windows.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        adds_bos: bool | None,
        max_length: int,
        num_tokens: int | None,
    ) -> None:
        """Read and encode the questions.

        Args:
            paths: Files with a JSON object {"prompt": .., "answer": ..} in each line.
            tokenizer: The model's tokenizer, which encodes a prompt and its answer together.
            adds_bos: As for `PromptEncoder`, which encodes the prompts.
            max_length: Greatest number of tokens of a question with its answer.
            num_tokens: Number of tokens to use, from the start; None for all.

        Raises:
            DataError: A file cannot be read or has a line that is not a question, or one is too
                long.
        """
        encoder = PromptEncoder(tokenizer, adds_bos)
        self._windows: list[TargetWindow] = []
        self.num_tokens = 0
        for path in paths:
            for number, prompt, answer in _questions(path):
                question = encoder.encode_text(prompt).token_ids
                whole = encoder.encode_text(prompt + answer).token_ids
                if whole[: len(question)] != question:  # Tokens join the two, which never happens
                    whole = (*question, *tokenizer.encode(answer))  # in a generation.
                tokens = torch.tensor(whole)
                if len(tokens) > max_length + 1:
                    raise DataError(
                        f"{path}, line {number}: the question and its answer have {len(tokens)}"
                        f" tokens, more than the {max_length + 1} that fit. Shorten or remove it."
                    )
                if num_tokens is not None and self.num_tokens >= num_tokens:
                    return
                is_target = torch.arange(1, len(tokens)) >= len(question)
                self._windows.append(TargetWindow(tokens, is_target))
                self.num_tokens += len(tokens) - 1

    def __iter__(self) -> Iterator[TargetWindow]:
        return iter(self._windows)


def _questions(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, the prompt and the answer of each line; raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task file {path} cannot be read: {error}") from None
    expected = 'a JSON object {"prompt": "..", "answer": ".."} with texts that are not empty'
    found = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected {expected}, but {error}") from None
        prompt, answer = _texts(content)
        if not prompt or not answer:
            raise DataError(f"{path}, line {number}: expected {expected}, not {line[:80]!r}")
        found += 1
        yield number, prompt, answer
    if not found:
        raise DataError(f"task file {path} is empty: expected {expected} in each line")


def _texts(content: object) -> tuple[str, str]:
    """Return the prompt and the answer of a JSON value, empty if they are not texts."""
    if not isinstance(content, dict):
        return "", ""
    prompt, answer = content.get("prompt"), content.get("answer")
    return (
        prompt if isinstance(prompt, str) else "",
        answer if isinstance(answer, str) else "",
    )
