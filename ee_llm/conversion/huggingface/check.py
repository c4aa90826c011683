"""Compares the logits of every exit with those of transformers, for `ee-llm convert --check`.

Legend of shapes: s sequence, h hidden, v vocabulary.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.conversion.huggingface.folder import Folder
from ee_llm.conversion.huggingface.settings import read_exits
from ee_llm.conversion.huggingface.tables import PREFIX
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from ee_llm.errors import ConversionError

TEXT = (
    "The committee met on the 3rd of May, 1894, in a room above the harbour. Its minutes list "
    "seven names, two of them crossed out; nobody remembered why (and nobody asked)."
)
TOLERANCE = 1e-4
"""Maximum difference relative to the largest logit; both models compute in float32."""

_MAX_TOKENS = 256


class Difference(NamedTuple):
    """The largest difference of the logits [s, v] at a boundary.

    relative: divided by the largest logit.
    """

    boundary: int
    absolute: float
    relative: float


def compare(
    folder: Path, reader: TensorReader, boundaries: Sequence[int], text: str
) -> list[Difference]:
    """Return the differences at the boundaries that transformers can compute.

    These are the last one, and those of exits that consist of a norm and an output weight. Raises
    ConversionError if transformers is not installed, or if the text has no tokens.
    """
    tokens = _tokens(reader, text)
    theirs = _logits(folder, tokens, boundaries)
    ours = load_reference(reader, torch.float32).forward(tokens)
    differences = []
    for boundary, logits in theirs.items():
        absolute = float((logits - ours[boundary]).abs().max())
        differences.append(Difference(boundary, absolute, absolute / float(logits.abs().max())))
    return differences


def _tokens(reader: TensorReader, text: str) -> Tensor:
    model = reader.config().model
    ids = load_tokenizer(reader.tokenizer()).encode(text)
    if not ids:
        raise ConversionError(f"--text {text!r} has no tokens. Pass a longer text.")
    return torch.tensor(ids[: min(_MAX_TOKENS, model.max_seq_length)])


@torch.no_grad()
def _logits(folder: Path, tokens: Tensor, boundaries: Sequence[int]) -> dict[int, Tensor]:
    """Return transformers' logits [s, v] by boundary.

    Exits with other parts than a norm and an output weight are omitted, because transformers cannot
    compute them.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConversionError("--check needs transformers: pip install 'ee-llm[convert]'") from None
    logging.set_verbosity_error()  # transformers warns about the tensors of exits
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    outputs = model(tokens[None], output_hidden_states=True)
    last = len(outputs.hidden_states) - 1
    opened = Folder(folder)
    return {
        boundary: outputs.logits[0]
        if boundary == last
        else _exit(model, opened, boundary, outputs.hidden_states[boundary][0])
        for boundary in boundaries
        if boundary == last or _is_comparable(opened)
    }


def _is_comparable(folder: Folder) -> bool:
    exits = read_exits(folder.settings)
    return exits is None or not {"mlp", "block"} & set(exits.options["head"])


def _exit(model: Any, folder: Folder, boundary: int, hidden: Tensor) -> Tensor:
    """Return the logits [s, v] of an exit for its input [s, h].

    An exit without its own tensors uses the model's final norm and output weight.
    """
    exits = read_exits(folder.settings)
    norm = copy.deepcopy(getattr(model.base_model, "norm", None) or model.base_model.ln_f)
    output = model.get_output_embeddings().weight
    if exits is None or exits.are_copies:
        return linear(norm(hidden), output)
    own = f"{PREFIX}exits.{boundary}."
    if "translator" in exits.options["head"]:
        weight, bias = (
            folder.tensor(f"{own}translator.{name}").float() for name in ("weight", "bias")
        )
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        hidden = linear(rms_norm(hidden, hidden.shape[-1:], eps=eps), weight, bias)
    if "norm" in exits.options["head"]:
        for name, parameter in norm.named_parameters():
            parameter.copy_(folder.tensor(f"{own}norm.{name}"))
        hidden = norm(hidden)
    if exits.options["output"] == "tied":
        output = model.get_input_embeddings().weight
    elif exits.options["output"] == "own":
        output = folder.tensor(f"{own}output.weight").float()
    index = exits.options["boundaries"].index(boundary)
    temperature: float = exits.options["temperatures"][index]
    return linear(hidden, output) / temperature
