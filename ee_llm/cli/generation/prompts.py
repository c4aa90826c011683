"""Read prompts: from an option, a file, standard input, or a batch file of JSON objects."""

import difflib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.cli.generation.strategies import check_strategy_options
from ee_llm.data.tokenization.chat_template import Message
from ee_llm.data.tokenization.token_settings import is_encodable
from ee_llm.errors import RequestError, UserError
from ee_llm.inference.choices import Bos, Measure
from ee_llm.inference.decoding.settings import DoLaLayers, EarlyHead, SLEDLayers, SLEDVariant
from ee_llm.inference.strategies import Strategy
from ee_llm.inference.text.chat import read_conversation, user_message
from ee_llm.inference.text.json_lines import MIB, decode, opened, read_objects, short
from ee_llm.inference.text.prompt_content import KINDS, prompt_content
from ee_llm.inference.text.prompt_encoder import EncodedPrompt, PromptEncoder

# Far more than the context of any model.
_MAX_PROMPT = 16 * MIB
# All prompts of a batch are in memory, as token ids, which take ten times as much space.
MAX_BATCH = 256 * MIB


@dataclass(frozen=True)
class Prompt:
    """A text, a conversation or token ids to continue, with the options for it.

    Attributes:
        options: The options. Those of a line override those of the command.
        text: The text, or "".
        messages: The conversation, or ().
        token_ids: The token ids, or ().
        id: The id of the prompt in a batch.
        where: The source of the prompt, for error messages.
    """

    options: GenerateOptions
    text: str = ""
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()
    id: str = "prompt"
    where: str = ""

    def encode(self, encoder: PromptEncoder) -> EncodedPrompt:
        """Return the token ids.

        Raises:
            RequestError: The tokenizer cannot encode the prompt.
        """
        options = self.options
        if self.messages:
            return encoder.encode_chat(self.messages, system=options.system, bos=options.bos)
        if self.token_ids:
            return encoder.encode_ids(self.token_ids, bos=options.bos)
        return encoder.encode_text(self.text, bos=options.bos, parse_special=options.parse_special)


@dataclass(frozen=True)
class InvalidLine:
    """An invalid line of a batch file that has an id, with its error message."""

    id: str
    where: str
    error: str


class _Line(BaseModel):
    """The fields of a line of a batch file. Options of the command replace missing fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: str | None = None
    messages: Any = None
    prompt_token_ids: list[int] | None = None
    thresholds: float | Literal["off"] | list[float | Literal["off"]] = "off"
    policy: str | None = None
    measure: Measure = "max_probability"
    strategy: Strategy = "exact"
    draft_exit: int | None = None
    draft_length: int = 4
    draft_threshold: float | None = None
    sled_rate: float = 1.0
    sled_scale: int = 10
    sled_tau: float = 1.0
    sled_layers: int | SLEDLayers | list[int | SLEDLayers] = "all"
    sled_variant: SLEDVariant = "paper"
    dola_layers: int | DoLaLayers | Literal["auto"] | list[int | DoLaLayers] = "auto"
    dola_alpha: float = 0.1
    early_head: EarlyHead | Literal["auto"] = "auto"
    bos: Bos = "auto"
    parse_special: bool = False
    system: str | None = None
    max_tokens: int = 64
    min_tokens: int = 0
    stop: str | list[str] = []
    stop_token_ids: int | list[int] = []
    ignore_eos: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None


def read_prompts(options: GenerateOptions) -> list[Prompt | InvalidLine]:
    """Return the prompts that the options select, and the invalid lines of a batch, in order.

    Raises:
        UserError: There is no prompt, a line of a batch is not a JSON object, or its id is neither
            a string nor an integer, or not unique.
    """
    if options.batch_file is not None:
        return _read_batch(options, options.batch_file)
    return [_read_prompt(options)]


def _read_prompt(options: GenerateOptions) -> Prompt:
    if options.prompt_token_ids:
        where = "--prompt-token-ids"
        return Prompt(options, token_ids=options.prompt_token_ids, where=where)
    chat_file = options.chat_file
    if options.chat is not None:
        path = Path(options.chat)
        # os.path.isfile, unlike Path.is_file, accepts a message that is too long for a file name.
        if path.suffix != ".json" or not os.path.isfile(path):
            text = _text(options.chat.encode(errors="surrogateescape"), "--chat")
            return Prompt(options, messages=user_message(text), where="--chat")
        chat_file = path
    if chat_file is not None:
        source = "standard input" if str(chat_file) == "-" else f"--chat-file {chat_file}"
        with opened(chat_file, source) as file:
            data = _limited(file.read(_MAX_PROMPT + 1), source)
        return Prompt(options, messages=read_conversation(data, source), where=source)
    if options.prompt is not None:
        source, data = "--prompt", options.prompt.encode(errors="surrogateescape")
    else:
        path = options.prompt_file or Path("-")
        is_standard = str(path) == "-"
        if options.prompt_file is None and sys.stdin.isatty():
            raise UserError(
                "There is no prompt. Give --prompt TEXT, --chat MESSAGE, --prompt-file FILE, or"
                " standard input."
            )
        source = "standard input" if is_standard else f"--prompt-file {path}"
        with opened(path, source) as file:
            data = file.read(_MAX_PROMPT + 1)
    return Prompt(options, text=_text(data, source), where=source)


def _text(data: bytes, source: str) -> str:
    text = decode(_limited(data, source), source)
    if not text:
        raise UserError(f"{source} is empty. Give at least one character.")
    return text


def _limited(data: bytes, source: str) -> bytes:
    if len(data) > _MAX_PROMPT:
        raise UserError(f"{source} is larger than {_MAX_PROMPT // MIB} MiB, too long for a prompt.")
    return data


def _read_batch(options: GenerateOptions, path: Path) -> list[Prompt | InvalidLine]:
    source = f"--batch-file {path}"
    lines: dict[str, Prompt | InvalidLine] = {}
    with opened(path, source) as file:
        for where, record in read_objects(file, source, MAX_BATCH):
            id = _id(record, where, default=str(len(lines) + 1))
            if id in lines:
                raise UserError(
                    f"{where}: id {short(id)} is also the id of {lines[id].where}. Give each line a"
                    " unique id."
                )
            try:
                lines[id] = _from_line(options, record, where, id)
            except ValueError as error:
                lines[id] = InvalidLine(id, where, str(error))
    if not lines:
        raise UserError(f"{source} is empty. Give one JSON object per line.")
    return list(lines.values())


def _id(record: dict[str, Any], where: str, default: str) -> str:
    id = record.pop("id", default)
    if type(id) not in (str, int) or not is_encodable(str(id)):
        raise UserError(f'{where}: "id" is {short(id)}. Give a string or an integer.')
    return str(id)


def _from_line(options: GenerateOptions, record: dict[str, Any], where: str, id: str) -> Prompt:
    try:
        line = _Line.model_validate(record)
    except ValidationError as error:
        raise RequestError(f"{where}: {_problem(error, record)}") from None
    content = prompt_content(record, where)
    own = {name: getattr(line, name) for name in line.model_fields_set if name not in KINDS}
    for name in ("thresholds", "stop", "stop_token_ids", "sled_layers", "dola_layers"):
        if name in own:
            own[name] = tuple(own[name]) if isinstance(own[name], list) else (own[name],)
    if line.system is not None and not is_encodable(line.system):
        raise RequestError(f'{where}: "system" is {short(line.system)}. Give a string.')
    parts = [name for name in ("thresholds", "measure") if name in own]
    if parts:
        if line.policy is not None:
            raise RequestError(f"{where}: the line has policy and {parts[0]}. Give one of them.")
        own["policy"] = None  # Thresholds of a line replace the command's policy file.
    elif line.policy is not None:
        own["policy"] = Path(line.policy)
    merged = replace(options, **own)
    try:
        check_strategy_options(merged, own)
    except UserError as error:
        raise RequestError(f"{where}: {error}") from None
    return Prompt(merged, id=id, where=where, **content)


def _problem(error: ValidationError, record: dict[str, Any]) -> str:
    """Return the first problem of a line in one sentence."""
    problem = error.errors()[0]
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        known = [*_Line.model_fields, "id"]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Use one of {', '.join(known)}."
        return f"{short(name)} is unknown. {hint}"
    if problem["type"] == "literal_error":
        return f"{name!r} is {short(record[name])}. Use one of {problem['ctx']['expected']}."
    return f"{name!r} is {short(record[name])}, which is invalid: {problem['msg'].lower()}."
