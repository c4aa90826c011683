"""Convert generations to and from the JSON that `ee-llm generate` writes and `verify` reads."""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ee_llm import distributed
from ee_llm.errors import RequestError
from ee_llm.inference.choices import Measure
from ee_llm.inference.decoding.settings import CONTRASTS, Contrast, contrast_fields
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import FinishReason, Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.speed import Speed
from ee_llm.inference.strategies import Strategy
from ee_llm.inference.text.json_lines import short

Record = dict[str, Any]

# Token ids and boundaries become indices of tensors.
_Index = Annotated[int, Field(ge=0, lt=2**31)]
_NonEmpty = Field(min_length=1)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _SamplingRecord(_Strict):
    """`SamplingParams` of one sample as JSON; fields with a default may be missing."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    n: Annotated[int, Field(ge=1, le=1)] = 1
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    max_tokens: int = 64
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[_Index] = []
    ignore_eos: bool = False
    logprobs: int | None = None


class _PolicyRecord(_Strict):
    measure: Measure
    thresholds: dict[str, float | None]
    digest: str


class _GenerationRecord(_Strict):
    prompt_token_ids: Annotated[list[_Index], _NonEmpty]
    token_ids: Annotated[list[_Index], _NonEmpty]
    exits: list[_Index]
    confidences: list[float]
    logprobs: list[float]
    finish_reason: FinishReason
    policy: _PolicyRecord
    sampling_params: _SamplingRecord
    strategy: Strategy
    num_layers: _Index
    dtype: str
    sled: dict[str, Any] | None = None
    dola: dict[str, Any] | None = None
    eos_token_ids: list[_Index] = []
    num_drafted: _Index = 0
    num_accepted: _Index = 0
    text: str | None = None
    pieces: list[str] = []


class _ErrorRecord(_Strict):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: str
    error: dict[Literal["message"], str]


def origin(prompt: str, request: Request, dtype: str, checkpoint: str, model: str) -> Record:
    """Return everything that determines a generation, as JSON's own types.

    Args:
        prompt: Text of the prompt.
        request: The request.
        dtype: Precision that the model computes in.
        checkpoint: Name of the checkpoint's directory.
        model: Fingerprint of the checkpoint.
    """
    policy, contrast = request.policy.under(request.strategy), request.contrast
    return {
        "prompt": prompt,
        "prompt_token_ids": list(request.prompt_token_ids),
        "strategy": request.strategy,
        **({} if contrast is None else {request.strategy: contrast_fields(contrast)}),
        "policy": {
            "measure": policy.measure,
            "thresholds": {str(b): policy.threshold(b) for b in policy.boundaries},
            "digest": policy.digest,
        },
        "sampling_params": request.sampling_params.to_dict(),
        "eos_token_ids": list(request.eos_token_ids),
        "dtype": dtype,
        "checkpoint": checkpoint,
        "model": model,
    }


def to_record(
    origin: Mapping[str, Any],
    output: RequestOutput,
    id: str | None = None,
    speed: Speed | None = None,
    *,
    with_pieces: bool = False,
) -> Record:
    """Return an output with its `origin`, as JSON's own types.

    Args:
        origin: See `origin`.
        output: The finished generation.
        id: Id of the prompt in a batch.
        speed: How fast it was generated.
        with_pieces: Include the text of each token.
    """
    has_top = any(output.top_logprobs)
    return {
        **({} if id is None else {"id": id}),
        **origin,
        "text": output.text,
        "token_ids": list(output.token_ids),
        **({"pieces": list(output.pieces)} if with_pieces else {}),
        "exits": list(output.exits),
        "confidences": list(output.confidences),
        "logprobs": list(output.logprobs),
        **(
            {"top_logprobs": [list(map(list, top)) for top in output.top_logprobs]}
            if has_top
            else {}
        ),
        "mean_depth": output.mean_depth,
        "num_layers": output.num_layers,
        "finish_reason": output.finish_reason,
        "num_drafted": output.num_drafted,
        "num_accepted": output.num_accepted,
        **({} if speed is None else {"speed": _speed(speed, output)}),
    }


def error_record(id: str, message: str) -> Record:
    """Return the record of a prompt that could not be continued."""
    return {"id": id, "error": {"message": message}}


def is_error(record: Mapping[str, Any]) -> bool:
    """Return whether a record was made by `error_record`."""
    try:
        _ErrorRecord.model_validate(record)
    except ValidationError:
        return False
    return True


def from_record(record: Mapping[str, Any], where: str) -> tuple[RequestOutput, str]:
    """Return the output that `to_record` described, and the dtype it was computed in.

    Args:
        record: The JSON object.
        where: Where it comes from, for errors.

    Raises:
        RequestError: A field is missing or malformed.
    """
    if "quantize" in record:
        raise RequestError(
            f"{where} was generated with quantize = {short(record['quantize'])}. The checkpoint has"
            " other weights, so it cannot be verified."
        )
    try:
        found = _GenerationRecord.model_validate(record)
    except ValidationError as error:
        raise RequestError(f"{where}: {_first_problem(error)}") from None
    num_new = len(found.token_ids)
    for name in ("exits", "confidences", "logprobs"):
        if len(getattr(found, name)) != num_new:
            raise RequestError(
                f"{where}: {name!r} has {len(getattr(found, name))} entries for {num_new} tokens"
            )
    if found.pieces and len(found.pieces) != num_new:
        raise RequestError(
            f"{where}: 'pieces' has {len(found.pieces)} entries for {num_new} tokens"
        )
    if found.dtype not in distributed.DTYPES:
        choices = ", ".join(distributed.DTYPES)
        raise RequestError(f"{where}: 'dtype' is {short(found.dtype)}, not one of {choices}")
    try:
        params = SamplingParams(**found.sampling_params.model_dump())
        policy = _policy(found.policy)
        contrast = _contrast(found)
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from None
    output = RequestOutput(
        request_id=str(record.get("id", where)),
        prompt_token_ids=tuple(found.prompt_token_ids),
        token_ids=tuple(found.token_ids),
        exits=tuple(found.exits),
        confidences=tuple(found.confidences),
        logprobs=tuple(found.logprobs),
        finish_reason=found.finish_reason,
        policy=policy,
        sampling_params=params,
        strategy=found.strategy,
        num_layers=found.num_layers,
        eos_token_ids=tuple(found.eos_token_ids),
        num_drafted=found.num_drafted,
        num_accepted=found.num_accepted,
        text=found.text,
        pieces=tuple(found.pieces),
        contrast=contrast,
    )
    return output, found.dtype


def difference(record: Mapping[str, Any], origin: Mapping[str, Any]) -> str | None:
    """Return the first key of `origin` in which a record differs; None if there is none.

    A key of a nested object is named with a dot: `sampling_params.seed`.
    """
    keys = [*origin, "quantize"]  # Only records of quantized weights have the last one.
    for key in keys:
        found, expected = record.get(key), origin.get(key)
        if found == expected:
            continue
        if isinstance(found, Mapping) and isinstance(expected, Mapping):
            inner = (name for name in expected if found.get(name) != expected[name])
            return ".".join([key, *islice(inner, 1)])
        return key
    return None


def as_json(record: Record) -> str:
    """Return a record as one line of ASCII."""
    return json.dumps(record, allow_nan=False)


def _speed(speed: Speed, output: RequestOutput) -> Record:
    record: Record = {
        "time_to_first_token_s": speed.time_to_first_token_s,
        "tokens_per_second": speed.tokens_per_second,
    }
    if output.strategy == "self-speculative":
        record["acceptance"] = speed.acceptance
        record["full_tokens_per_second"] = speed.full_tokens_per_second
        record["against_full"] = speed.against_full
    return record


def _policy(record: _PolicyRecord) -> ExitPolicy:
    boundaries = tuple(int(boundary) for boundary in record.thresholds)
    policy = ExitPolicy(boundaries, tuple(record.thresholds.values()), record.measure)
    if record.digest != policy.digest:
        raise RequestError(
            f"'policy.digest' is {short(record.digest)}, but the thresholds give {policy.digest}"
        )
    return policy


def _contrast(record: _GenerationRecord) -> Contrast | None:
    """Return the settings of `sled` or `dola`; None for other strategies."""
    if record.strategy not in CONTRASTS:
        return None
    fields = record.sled if record.strategy == "sled" else record.dola
    if fields is None:
        raise RequestError(f"{record.strategy!r} is missing, the settings of the strategy")
    try:
        return CONTRASTS[record.strategy](**fields)
    except TypeError:
        raise RequestError(
            f"{record.strategy!r} is {short(fields)}, not settings of the strategy"
        ) from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{name!r} is missing. Give a line that 'ee-llm generate' wrote."
    if problem["type"] == "literal_error":
        return f"{name!r} is {short(problem['input'])}, not one of {problem['ctx']['expected']}"
    return f"{name!r} is {short(problem['input'])}: {problem['msg'].lower()}"
