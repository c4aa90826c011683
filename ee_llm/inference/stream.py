"""Stream the tokens of one request, each with the text that it completes."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Self

from ee_llm.errors import RunError
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.outputs import RequestOutput, StepOutput, TokenOutput
from ee_llm.inference.request import Request
from ee_llm.inference.text.detokenizer import GeneratedText


class StepTexts:
    """Adds text to the tokens, and to the output, in the steps of one request.

    A token's text is the text that has become final with it. Characters that may still become part
    of a stop string, and incomplete multi-byte characters, come with a later token. Concatenated,
    the texts are the output's text.

    Attributes:
        output: The finished output; None before the end.
        generated: The text so far, and the text of each token.
    """

    def __init__(
        self, request: Request, prompt: str, detokenize: Callable[[list[int]], str]
    ) -> None:
        """Start without tokens; prompt: the text of the request's prompt."""
        self.output: RequestOutput | None = None
        self.generated = GeneratedText.of_request(request, detokenize)
        self._prompt = prompt

    def add(self, step: StepOutput) -> list[TokenOutput]:
        """Return the tokens of the next step, each with its text."""
        finished = step.request_output
        # If the request failed, the reason may be that the tokenizer cannot decode its tokens.
        has_failed = finished is not None and finished.error is not None
        tokens = []
        for number, token in enumerate(step.tokens, start=1):
            self.generated.add(token.token_id, skip_errors=has_failed)
            is_last = finished is not None and number == len(step.tokens)
            if is_last:
                self.generated.finish(skip_errors=has_failed)
            tokens.append(replace(token, text=self.generated.take_text(is_last)))
        if finished is not None:
            if not step.tokens:
                self.generated.finish(skip_errors=has_failed)
            self.output = replace(
                finished,
                prompt=self._prompt,
                text=self.generated.text,
                pieces=self.generated.trimmed_pieces,
            )
        return tokens


class TokenStream(Iterator[TokenOutput]):
    """An iterator over the tokens of a request.

    A token's text is the text that has become final with it. Characters that may still become part
    of a stop string, and incomplete multi-byte characters, come with a later token. Concatenated,
    the texts are the output's text. The request is aborted if the stream is closed, left as a
    context manager, or garbage-collected before its end. If the request fails, the iterator raises
    RunError after the last token. It also raises RunError if someone else aborts the request, for
    example by closing the model.

    Attributes:
        output: The finished output; None before the end.
        generated: The text so far, and the text of each token.
    """

    def __init__(
        self,
        engine: EngineBase,
        request: Request,
        prompt: str,
        detokenize: Callable[[list[int]], str],
    ) -> None:
        self.output: RequestOutput | None = None
        self._texts = StepTexts(request, prompt, detokenize)
        self.generated = self._texts.generated
        self._tokens: deque[TokenOutput] = deque()
        self._error: str | None = None
        self._steps = engine.stream(request)

    def __next__(self) -> TokenOutput:
        while not self._tokens:
            if self._error is not None:
                error, self._error = self._error, None
                raise RunError(error)
            self._tokens.extend(self._texts.add(next(self._steps)))
            self.output = self._texts.output
            self._error = None if self.output is None else self.output.error
        return self._tokens.popleft()

    def close(self) -> None:
        """Abort the request unless it is finished."""
        self._tokens.clear()
        self._error = None
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
