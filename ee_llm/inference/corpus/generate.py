"""Write text that a model generates as prepared data: PREFIX.bin, PREFIX.idx and PREFIX.meta.json.

The files have the exact tokens of the model: tokenizing its text again could give others.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.atomic_file import open_output
from ee_llm.data.indexed import IndexedWriter, token_dtype
from ee_llm.data.prepare import commit
from ee_llm.errors import UserError
from ee_llm.inference.corpus.sampling import sample_documents
from ee_llm.inference.loaded_model import LoadedModel
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.text.prompt_encoder import EncodedPrompt


@dataclass(frozen=True)
class CorpusReport:
    """Summary of the files that `generate_corpus` wrote; `str` gives a readable text.

    Attributes:
        prefix: Path of the files without .bin and .idx.
        num_documents: Number of documents.
        num_tokens: Number of tokens in the files: prompts, generated tokens, and end-of-document
            tokens after documents that the model did not end.
        num_generated: Number of generated tokens.
        num_ended: Number of documents that the model ended itself, with an end token.
        seconds: Time of the generation.
    """

    prefix: str
    num_documents: int
    num_tokens: int
    num_generated: int
    num_ended: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return self.num_generated / self.seconds

    @property
    def ended_share(self) -> float:
        """Share of documents that the model ended itself."""
        return self.num_ended / self.num_documents

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON's own types."""
        figures = {"tokens_per_second": self.tokens_per_second, "ended_share": self.ended_share}
        return asdict(self) | figures

    def __str__(self) -> str:
        return (
            f"{self.prefix}.bin and .idx: {self.num_documents:,} documents, {self.num_tokens:,} "
            f"tokens, {self.num_generated:,} of them generated in {self.seconds:,.1f} s "
            f"({self.tokens_per_second:,.1f} tokens/s); the model ended {self.ended_share:.0%} of "
            "the documents itself"
        )


def check_absent(prefix: Path, *, jsonl: bool = False) -> None:
    """Raise UserError if an output of `generate_corpus` exists."""
    for suffix in (".bin", ".idx", ".meta.json", *([".jsonl"] if jsonl else [])):
        path = Path(f"{prefix}{suffix}")
        if path.exists():
            raise UserError(f"{path} already exists. Choose another --output, or remove the file.")


def generate_corpus(
    model: LoadedModel,
    output: Path,
    prompts: Sequence[EncodedPrompt],
    sampling_params: SamplingParams,
    *,
    num_tokens: int | None = None,
    max_num_seqs: int = 16,
    jsonl: bool = False,
    progress: bool = True,
) -> CorpusReport:
    """Write continuations of prompts by the full model, as `sample_documents` yields them.

    A document has the tokens of its prompt and its generated tokens, and ends with the
    end-of-document token. A prompt that begins with this token is stored without it, because it
    ends the document before. The files are created when all documents are complete.

    Args:
        model: The model; this rank leads its engine.
        output: Path of the files without .bin and .idx.
        prompts: The prompts.
        sampling_params: How tokens are drawn and when a document ends.
        num_tokens: Least number of generated tokens; None continues each prompt once.
        max_num_seqs: Maximum number of documents that are sampled at once.
        jsonl: Also write PREFIX.jsonl with the text of each document.
        progress: Show a progress bar in terminals.

    Raises:
        UserError: The output exists or cannot be written, or a prompt does not fit the model.
        RunError: A document failed.
    """
    check_absent(output, jsonl=jsonl)
    tokenizer = model.tokenizer
    eos = tokenizer.eos_token_id
    num_generated = num_ended = 0
    start = time.monotonic()
    unit, total = ("documents", len(prompts)) if num_tokens is None else ("tokens", num_tokens)
    count = TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}")
    with ExitStack() as stack:
        # The model may have more token ids than the tokenizer.
        size = max(tokenizer.vocab_size, model.config.model.vocab_size)
        writer = stack.enter_context(IndexedWriter(output, token_dtype(size)))
        texts = stack.enter_context(open_output(Path(f"{output}.jsonl"))) if jsonl else None
        bar = stack.enter_context(
            distributed.progress_bar("sampling", total, count, is_quiet=not progress)
        )
        (task,) = bar.task_ids

        def show(tokens: int, documents: int) -> None:
            speed = tokens / (time.monotonic() - start)
            done = documents if num_tokens is None else min(tokens, num_tokens)
            bar.update(task, completed=done, description=f"{speed:,.0f} tokens/s")

        documents = sample_documents(
            model,
            prompts,
            sampling_params,
            num_tokens=num_tokens,
            max_num_seqs=max_num_seqs,
            on_step=show,
        )
        for document in stack.enter_context(closing(documents)):
            writer.add(_tokens(document, eos))
            num_generated += len(document.token_ids)
            num_ended += document.finish_reason == "eos"
            if texts is not None:
                texts.write(_line(model, document))
        commit(
            writer,
            output,
            tokenizer,
            *([] if texts is None else [texts]),
            generated_by=_origin(model, sampling_params),
        )
    return CorpusReport(
        str(output),
        writer.num_documents,
        writer.num_tokens,
        num_generated,
        num_ended,
        time.monotonic() - start,
    )


def _tokens(document: RequestOutput, eos: int) -> list[int]:
    prompt = document.prompt_token_ids
    tokens = [*(prompt[1:] if prompt[0] == eos else prompt), *document.token_ids]
    return tokens if tokens[-1] == eos else [*tokens, eos]


def _line(model: LoadedModel, document: RequestOutput) -> bytes:
    text = model.decode([*document.prompt_token_ids, *document.token_ids])
    record = {"text": text, "finish_reason": document.finish_reason}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _origin(model: LoadedModel, sampling_params: SamplingParams) -> dict[str, Any]:
    """Return what determines the documents, besides the prompts."""
    return {
        "checkpoint": model.checkpoint.name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sampling_params": sampling_params.to_dict(),
    }
