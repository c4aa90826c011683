"""The model `ee_llm` of lm_eval: likelihoods of given texts, and generated texts."""

import logging
from contextlib import closing
from functools import cached_property, partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ee_llm import distributed
from ee_llm.architecture.tensors import take_tensors
from ee_llm.checkpoint.gates import TensorsWithGates, gated_exits
from ee_llm.checkpoint.read import TensorReader
from ee_llm.errors import RequestError, RunError
from ee_llm.evaluation.harness.requests import (
    make_window,
    merge_windows,
    sampling_params,
    with_own_seeds,
)
from ee_llm.evaluation.harness.run_statistics import RunStatistics
from ee_llm.evaluation.harness.scorer import Scorer
from ee_llm.evaluation.harness.settings import num_sequences, parse_arguments, resolve_decoding
from ee_llm.evaluation.harness.text import HarnessText
from ee_llm.inference.execution.stage import check_layout
from ee_llm.inference.exits.policy import check_exits
from ee_llm.inference.llm import LLM
from ee_llm.inference.load import policy_fingerprint
from ee_llm.inference.strategies import resolve_strategy
from ee_llm.inference.text.prompt_encoder import EncodedPrompt

logger = logging.getLogger(__name__)

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts of a context and a continuation, None for a rolling window, and their token ids."""


class EarlyExitLM(TemplateLM):
    """An early-exit model in lm_eval.

    Texts are encoded, truncated and divided into windows as by lm_eval's Hugging Face adapter.

    Likelihood tasks predict every token of a continuation from the true tokens before it, with the
    exit that the strategy takes there. Generation runs in the inference engine. The weights are
    loaded when the first request needs them, and only for one of the two kinds at a time.

        lm = EarlyExitLM(pretrained="runs/tuned", policy="policy.json")
        results = lm_eval.simple_evaluate(lm, tasks=["arc_easy"])
    """

    def __init__(self, **arguments: Any) -> None:
        """Read the checkpoint's configuration and tokenizer.

        Args:
            arguments: The fields of `HarnessOptions`, and settings of a strategy: `draft_exit`,
                `draft_length` and `draft_threshold`, or the fields of `SLED` and `DoLa` after
                `sled_` and `dola_`.

        Raises:
            UserError: An argument is unknown, contradicts another one or does not fit the model, or
                the checkpoint cannot be read.
        """
        super().__init__()
        self.options, own = parse_arguments(arguments)
        _check_processes()
        self._reader = TensorReader(self.options.pretrained)
        self._config = self._reader.config()
        check_layout(self._config, self.options.tensor, self.options.pipeline)
        fingerprint = partial(policy_fingerprint, self._reader)
        self.decoding = resolve_decoding(self.options, own, self._config, fingerprint)
        name, speculation, _ = resolve_strategy(self.decoding.strategy, self._config)
        gated, boundaries = gated_exits(self._reader), self._config.exits.boundaries
        check_exits(self.decoding.policy, name, speculation, boundaries, gated)
        self._max_length = self._check_max_length()
        self._text = HarnessText(
            self._reader,
            self._config.data.eos_token,
            self.options.add_bos_token,
            self.options.chat_template,
        )
        self._engine: LLM | None = None
        self._scorer: Scorer | None = None
        self._statistics = RunStatistics()
        self._has_warned = False

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-document token."""
        return self._text.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context."""
        return self._text.prefix_token_id

    @property
    def max_length(self) -> int:
        """Maximum number of tokens that the model sees."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Maximum number of generated tokens if the task does not say."""
        return self.options.max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer and the chat template, for lm_eval's cache of requests."""
        return self._text.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text; see `HarnessText.encode`."""
        return self._text.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template, for lm_eval's records."""
        if isinstance(chat_template, str):
            raise RequestError(
                f"--apply_chat_template {chat_template}: templates cannot be selected by name. Use"
                " --apply_chat_template, and --model_args chat_template=FILE for another one."
            )
        return self._text.template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt for a conversation.

        Args:
            chat_history: Messages with a "role" and a "content".
            add_generation_prompt: The model answers. Otherwise, it continues the last message.
        """
        return self._text.render(chat_history, continues_last=not add_generation_prompt)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log likelihood of each text, in windows of at most `max_length` tokens."""
        pairs: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            pairs += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum((next(scores)[0] for _ in range(count)), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log likelihood of each continuation, and whether greedy decoding writes it."""
        self._warn_of_speculation()
        windows = [
            make_window(context, continuation, self.max_length, texts)
            for texts, context, continuation in requests
        ]
        longest = self.max_length + 1  # The last token is only predicted.
        num_cut = sum(len(one) + len(other) > longest for _, one, other in requests)
        self._statistics.add_truncated("loglikelihood", num_cut, len(requests), self.max_length)
        merged = merge_windows(windows)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(windows)
        if not merged:
            return found
        scorer = self._scorer_for(len(merged[0][0].tokens))
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as bar:
            scores = scorer.score([window for window, _ in merged])
            for (_, numbers), score in zip(merged, scores, strict=True):
                answers = zip(score.logprobs, score.is_greedy, strict=True)
                for number, answer in zip(numbers, answers, strict=True):
                    self._statistics.add_exits("loglikelihood", score.exits)
                    found[number] = answer
                    texts = requests[number][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(numbers))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model generates for each request, up to its stop strings."""
        if not requests:
            return []
        eos_text = self._text.text_of(self.eot_token_id)
        params = [
            sampling_params(generation, self.max_gen_toks, eos_text)
            for _, generation in (request.args for request in requests)
        ]
        prompts, num_cut = [], 0
        for request, one in zip(requests, params, strict=True):
            prompt, is_cut = self._prompt(request.args[0], one.max_tokens)
            prompts.append(prompt)
            num_cut += is_cut
        self._statistics.add_truncated("generate_until", num_cut, len(requests), self.max_length)
        llm = self._llm()
        by_id = {}
        for number, (prompt, one) in enumerate(
            zip(prompts, with_own_seeds(prompts, params), strict=True)
        ):
            request = llm.make_request(
                EncodedPrompt("", prompt), one, strategy=self.decoding.strategy
            )
            by_id[request.id] = (number, request)
        found = [""] * len(requests)
        with (
            tqdm(
                total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
            ) as bar,
            closing(
                llm.run([request for _, request in by_id.values()], dict.fromkeys(by_id, ""))
            ) as outputs,
        ):
            for output in outputs:
                if output.error is not None:
                    raise RunError(f"a generation failed: {output.error}")
                number = by_id[output.request_id][0]
                self._statistics.add_exits("generate_until", output.exits)
                # As in the Hugging Face adapter, the tokens are decoded without the prompt.
                text = llm.decode(output.token_ids)
                found[number] = postprocess_generated_text(text, list(params[number].stop), None)
                self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
                bar.update(1)
        return found

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval records about the model and the run."""
        policy = self.decoding.policy
        name, speculation, contrast = resolve_strategy(self.decoding.strategy, self._config)
        settings = speculation or contrast
        return {
            "model_checkpoint": str(self._reader.path),
            "model_fingerprint": self._reader.fingerprint(),
            "model_dtype": str(self._dtype).removeprefix("torch."),
            "model_num_layers": self._config.model.num_layers,
            "strategy": name,
            "strategy_settings": None if settings is None else vars(settings),
            "exit_measure": policy.measure,
            "exit_thresholds": dict(
                zip(map(str, policy.boundaries), policy.under(name).thresholds, strict=True)
            ),
            "exit_policy_digest": policy.under(name).digest,
            **self._statistics.to_dict(),
        }

    def close(self) -> None:
        """Free the model, and shut down its other ranks."""
        self._scorer = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @cached_property
    def _dtype(self) -> torch.dtype:
        return distributed.dtype_named(self.options.dtype)

    def _prompt(self, context: str, max_tokens: int) -> tuple[tuple[int, ...], bool]:
        """Return the token ids of a context, cut so that `max_tokens` more fit, and if they are."""
        room = self.max_length - max_tokens
        if room < 1:
            raise RequestError(
                f"max_gen_toks = {max_tokens} leaves no room for a prompt in max_length ="
                f" {self.max_length}. Use --gen_kwargs max_gen_toks={self.max_length // 2}."
            )
        ids = self.tok_encode(context)
        return tuple(ids[-room:] or [self.prefix_token_id]), len(ids) > room

    def _llm(self) -> LLM:
        self._scorer = None
        if self._engine is None:
            options = self.options
            self._engine = LLM(
                options.pretrained,
                dtype=options.dtype,
                tensor=options.tensor,
                pipeline=options.pipeline,
                max_num_seqs=num_sequences(options),
                cache_tokens=options.cache_tokens,
                exits=self.decoding.policy,
            )
        return self._engine

    def _scorer_for(self, longest: int) -> Scorer:
        """Return a scorer for windows of at most `longest` tokens."""
        if self.options.tensor * self.options.pipeline > 1:
            raise RequestError(
                f"tensor = {self.options.tensor} x pipeline = {self.options.pipeline}: likelihood"
                " tasks run on one device only. Use 1 x 1, or generate_until tasks."
            )
        if self._engine is not None:
            self.close()
        if self._scorer is None or self._scorer.longest < longest:
            self._scorer = None
            name, _, contrast = resolve_strategy(self.decoding.strategy, self._config)
            tensors = take_tensors(
                self._config, TensorsWithGates(self._reader), self._dtype, distributed.device()
            )
            policy = self.decoding.policy
            self._scorer = Scorer(self._config, tensors, longest, policy, name, contrast)
        return self._scorer

    def _warn_of_speculation(self) -> None:
        name, _, _ = resolve_strategy(self.decoding.strategy, self._config)
        if name == "self-speculative" and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "strategy = 'self-speculative' does not affect likelihood tasks: nothing is"
                " generated, and the final exit scores every token."
            )

    def _check_max_length(self) -> int:
        longest = self._config.model.max_seq_length
        length = self.options.max_length
        if length is not None and length > longest:
            raise RequestError(
                f"max_length = {length} is above the model's max_seq_length = {longest}."
                f" Use 1 to {longest}."
            )
        return longest if length is None else length


def _check_processes() -> None:
    """Raise RequestError if a launcher has started several processes."""
    if (distributed.launched_world_size() or 1) > 1:
        raise RequestError(
            "a launcher has started several processes, but lm_eval runs ee_llm in one. Start it"
            " without a launcher, with --model_args tensor=.. and pipeline=.. for several ranks."
        )
