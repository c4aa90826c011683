"""Decode with transformers' `generate` on the same weights, for comparison in decode.py."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.parameter_names import output_weight_name
from tools.bench.decode_model import Model
from tools.bench.llama import llama_config, llama_weights


class Decoded(NamedTuple):
    """The seconds of a batch and the new tokens of each prompt."""

    seconds: float
    tokens: list[tuple[int, ...]]


class Peer:
    """A model in transformers' LlamaForCausalLM with sdpa attention, decoded greedily."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        """Load the weights of `model` into transformers.

        Raises:
            ValueError: transformers is not installed, or the model is not a llama model.
        """
        if model.config.model.family != "llama" or model.config.model.position != "rope":
            raise ValueError(
                f"model.family = {model.config.model.family} with model.position ="
                f" {model.config.model.position} cannot be compared with transformers. Use"
                " --no-peers."
            )
        try:
            self._model = llama(model).to(distributed.device(), dtype).eval()
        except ImportError as error:
            raise ValueError(f"{error}. Install ee_llm[dev], or use --no-peers.") from error
        self._model.generation_config.eos_token_id = (
            None  # so that all outputs have the same length
        )

    @torch.no_grad()
    def decode(self, prompts: Sequence[tuple[int, ...]], num_new: int, **options: Any) -> Decoded:
        """Return the output of `generate` for prompts of equal length; `options` go to it."""
        tokens = torch.tensor(prompts, device=distributed.device())
        distributed.synchronize()
        start = time.perf_counter()
        made = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=num_new,
            **options,
        )
        distributed.synchronize()
        seconds = time.perf_counter() - start
        return Decoded(seconds, [tuple(row[len(prompts[0]) :].tolist()) for row in made])

    def draft_at(self, model: Model, boundary: int) -> None:
        """Make drafts of `assistant_early_exit` use the head of the exit at `boundary`.

        transformers drafts with the final norm and output weight, which were not trained for that
        depth. Without this change, its drafts would be unfairly worse than ours.

        Raises:
            ValueError: The exit has more than a norm and a projection.
        """
        config = model.config
        if config.exits.head != ("norm",):
            raise ValueError(
                f"exits.head = {list(config.exits.head)}: transformers can draft only with an exit"
                " of a norm and a projection."
            )
        inner, depth = self._model.model, config.model.num_layers
        own_norm = type(inner.norm)(config.model.hidden_size, eps=config.model.norm_eps)
        own_norm.weight = _like(model.tensors[f"exits.{boundary}.norm.weight"], inner.norm.weight)
        inner.norm = _ByDepth(inner, {depth: inner.norm, boundary: own_norm})
        if output_weight_name(config, boundary) != output_weight_name(config, depth):
            own = torch.nn.Linear(config.model.hidden_size, config.model.vocab_size, bias=False)
            weight = model.tensors[output_weight_name(config, boundary)]
            own.weight = _like(weight, self._model.lm_head.weight)
            heads = {depth: self._model.lm_head, boundary: own}
            self._model.lm_head = _ByDepth(inner, heads)

    def decode_assisted(
        self, prompt: tuple[int, ...], num_new: int, boundary: int, draft_length: int | None
    ) -> Decoded:
        """Return the output of `generate` with drafts at an exit.

        Args:
            prompt: The token ids of one prompt.
            num_new: The number of new tokens.
            boundary: The exit that drafts.
            draft_length: Tokens per draft, or None for transformers' own choice.
        """
        settings = self._model.generation_config
        before = settings.num_assistant_tokens, settings.assistant_confidence_threshold
        if draft_length is not None:
            settings.num_assistant_tokens = draft_length
            settings.assistant_confidence_threshold = 0.0
        try:
            return self.decode([prompt], num_new, assistant_early_exit=boundary)
        finally:
            settings.num_assistant_tokens, settings.assistant_confidence_threshold = before


class _ByDepth(torch.nn.Module):
    """Select a module by the number of layers that the model currently has."""

    def __init__(self, inner: Any, modules: dict[int, torch.nn.Module]) -> None:
        super().__init__()
        self._config = inner.config
        self._by_depth = modules

    def forward(self, x: Tensor) -> Tensor:
        return self._by_depth[self._config.num_hidden_layers](x)


def llama(model: Model) -> Any:
    """Return transformers' LlamaForCausalLM with the model's weights, in float32."""
    from transformers import LlamaForCausalLM, logging

    logging.set_verbosity_error()  # its own drafting triggers its warnings
    alone = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
    theirs = LlamaForCausalLM(llama_config(model.config, **alone))
    theirs.load_state_dict(llama_weights(model.config, model.tensors))
    return theirs


def _like(weight: Tensor, other: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.to(other.device, other.dtype), requires_grad=False)
