"""The prompts of a sweep: from a file, or cut from a text."""

from collections.abc import Sequence
from pathlib import Path

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import stated_bos
from ee_llm.config import Config
from ee_llm.data.indexed import IndexedTokens
from ee_llm.data.prepare import check_tokenizer
from ee_llm.data.text_windows import TextWindows
from ee_llm.data.tokenization.token_settings import is_encodable
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.errors import DataError, RequestError
from ee_llm.evaluation.sweep.options import DEFAULT_PROMPTS, SweepOptions
from ee_llm.inference.text.chat import check_messages
from ee_llm.inference.text.json_lines import MIB, opened, read_objects, short
from ee_llm.inference.text.prompt_content import KINDS, prompt_content
from ee_llm.inference.text.prompt_encoder import EncodedPrompt, PromptEncoder, first_tokens

_MAX_FILE = 256 * MIB
_TEXT_TOKENS = 16
"""Tokens of a text that are read for each token of a prompt, so that prompts lie apart."""


def find_prompts(
    options: SweepOptions, reader: TensorReader, config: Config, given: Sequence[object] = ()
) -> list[EncodedPrompt]:
    """Return the prompts as token ids, with room for the tokens to generate.

    Args:
        options: The options.
        reader: The checkpoint, whose tokenizer encodes texts.
        config: The model's configuration.
        given: Texts, lists of token ids and conversations, instead of those of the options.

    Raises:
        UserError: There is no prompt or more than one source of them, or a prompt is not valid.
    """
    sources = {
        "prompts": bool(given) or options.prompts is not None,
        "data": bool(options.data),
        "text": bool(options.text),
    }
    used = [name for name, is_given in sources.items() if is_given]
    if len(used) != 1:
        found = f"{' and '.join(used)} are both given" if used else "there are no prompts"
        raise RequestError(
            f"{found}. Give one of these: prompts (--prompts), a file of JSON lines; data (--data),"
            " prefixes of prepared data; text (--text), text files."
        )
    tokenizer = load_tokenizer(reader.tokenizer(), config.data.eos_token)
    adds_bos = stated_bos(reader.path)
    encoder = PromptEncoder(tokenizer, adds_bos, options.chat_template)
    if given:
        prompts = [
            _given(prompt, f"prompts[{number}]", encoder) for number, prompt in enumerate(given)
        ]
    elif options.prompts is not None:
        prompts = _of_file(options.prompts, encoder)
    else:
        prompts = _of_text(options, tokenizer, first_tokens("auto", tokenizer, adds_bos))
    count = len(prompts) if options.num_prompts is None else options.num_prompts
    if count > len(prompts):
        raise RequestError(
            f"num_prompts = {count} is more than the {len(prompts)} given prompts. Give more"
            " prompts, or a smaller num_prompts."
        )
    prompts = prompts[:count]
    _check_fit(prompts, options, config)
    return prompts


def _given(prompt: object, where: str, encoder: PromptEncoder) -> EncodedPrompt:
    if isinstance(prompt, str) and prompt and is_encodable(prompt):
        return encoder.encode_text(prompt)
    if isinstance(prompt, Sequence) and prompt and not isinstance(prompt, str | bytes):
        if all(type(token) is int for token in prompt):
            return encoder.encode_ids(prompt)
        return encoder.encode_chat(check_messages(list(prompt), where))
    raise RequestError(f"{where} is {short(prompt)}. Give a text, token ids, or a conversation.")


def _of_file(path: Path, encoder: PromptEncoder) -> list[EncodedPrompt]:
    source = f"prompts {path}"
    prompts = []
    with opened(path, source) as file:
        for where, record in read_objects(file, source, _MAX_FILE):
            if unknown := sorted(record.keys() - {*KINDS, "id"}):
                raise RequestError(
                    f"{where}: {short(unknown[0])} is unknown. Give one of {', '.join(KINDS)}: the"
                    " options of a sweep are the same for all prompts."
                )
            content = prompt_content(record, where)
            prompts.append(_given(next(iter(content.values())), where, encoder))
    if not prompts:
        raise RequestError(f"{source} is empty. Give one JSON object per line.")
    return prompts


def _of_text(options: SweepOptions, tokenizer: Tokenizer, first: list[int]) -> list[EncodedPrompt]:
    """Return prompts cut from a text; those that do not begin with the tokens `first` get them."""
    count = DEFAULT_PROMPTS if options.num_prompts is None else options.num_prompts
    length = options.prompt_length
    if options.data:
        for prefix in options.data:
            check_tokenizer(prefix, tokenizer)
        windows = _of_data([IndexedTokens(prefix) for prefix in options.data], length, count)
    else:
        limit = _TEXT_TOKENS * count * length
        found = [w.tolist()[:length] for w in TextWindows(options.text, tokenizer, length, limit)]
        whole = [window for window in found if len(window) == length]
        windows = [whole[i * len(whole) // count] for i in range(min(count, len(whole)))]
    if len(windows) < count:
        names = " ".join(options.data or map(str, options.text))
        raise DataError(
            f"{names} is too short for num_prompts = {count} prompts of prompt_length = {length}"
            " tokens. Give more text, or a smaller num_prompts or prompt_length."
        )
    windows = [ids if ids[: len(first)] == first else [*first, *ids] for ids in windows]
    texts = ([i for i in ids if 0 <= i < tokenizer.vocab_size] for ids in windows)
    return [
        EncodedPrompt(tokenizer.decode(known), tuple(ids))
        for known, ids in zip(texts, windows, strict=True)
    ]


def _of_data(data: Sequence[IndexedTokens], length: int, count: int) -> list[list[int]]:
    """Return `count` windows of `length` tokens at even distances, none of data too short."""
    total = sum(one.num_tokens // length for one in data)
    chosen = iter([index * total // count for index in range(count)] if total >= count else [])
    windows: list[list[int]] = []
    index, end = next(chosen, total), 0
    for one in data:
        start, end = end, end + one.num_tokens // length
        while index < end:
            place = (index - start) * length
            windows.append(one.tokens[place : place + length].tolist())
            index = next(chosen, total)
    return windows


def _check_fit(prompts: Sequence[EncodedPrompt], options: SweepOptions, config: Config) -> None:
    is_cut = bool(options.data or options.text)
    longest, vocab_size = config.model.max_seq_length, config.model.vocab_size
    for number, prompt in enumerate(prompts, start=1):
        ids = prompt.token_ids
        if not ids:
            raise RequestError(f"prompt {number} is empty. Give at least one token.")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise RequestError(
                f"prompt {number} has token ids {min(ids)} to {max(ids)}, outside model.vocab_size"
                f" = {vocab_size}. Use the checkpoint's tokenizer."
            )
        if len(ids) + options.max_tokens > longest:
            raise RequestError(
                f"prompt {number} has {len(ids)} tokens, which with max_tokens ="
                f" {options.max_tokens} are more than {longest} (model.max_seq_length)."
                f" {'Lower prompt_length' if is_cut else 'Shorten it'}, or lower max_tokens."
            )
