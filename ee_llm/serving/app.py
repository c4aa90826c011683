"""The web application: its routes, and how errors become responses."""

import logging
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ee_llm.errors import UserError
from ee_llm.inference.choices import Bos
from ee_llm.serving.api_keys import ApiKeys
from ee_llm.serving.events import ClientDisconnectedError
from ee_llm.serving.formats import ChatFormat, CompletionFormat, Header, make_header, to_json
from ee_llm.serving.generation import Endpoint, respond
from ee_llm.serving.middleware import RequestGate, error_response
from ee_llm.serving.page.routes import add_page
from ee_llm.serving.protocol.chat import ChatRequest, ChatResponse
from ee_llm.serving.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    CompletionResponse,
)
from ee_llm.serving.protocol.errors import ApiError, bad_request
from ee_llm.serving.protocol.models import (
    DetokenizeRequest,
    DetokenizeResponse,
    Health,
    Model,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    Version,
    model_exits,
)
from ee_llm.serving.service import Service
from ee_llm.version import __version__

logger = logging.getLogger(__name__)

_CLIENT_GONE = 499  # nginx's status for a client that has disconnected; nobody receives it
_SCHEMA_PATH = "#/components/schemas/{model}"


def create_app(service: Service, hosts: Collection[str] = ()) -> FastAPI:
    """Return the application that serves a model.

    Args:
        service: The model and its limits.
        hosts: Hosts that requests may name; empty for any. See `RequestGate`.
    """
    # The pages of FastAPI's documentation load scripts from elsewhere.
    app = FastAPI(title="ee_llm", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(RequestGate, keys=ApiKeys(service.settings.api_keys), hosts=hosts)
    _handle_errors(app)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_models(app, service)
    _add_probes(app, service)
    if service.settings.page:
        add_page(app)
    _document_bodies(app)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    def header(prefix: str) -> Header:
        name, fingerprint = service.settings.model_name, service.system_fingerprint
        return make_header(prefix, name, fingerprint)

    completions = Endpoint(
        CompletionRequest,
        "prompt",
        lambda body: body.prompts,
        lambda body, clamps: CompletionFormat(body, header("cmpl"), service.token_text, clamps),
        DEFAULT_MAX_TOKENS,
    )
    chat = Endpoint(
        ChatRequest,
        "messages",
        lambda body: [body.messages],
        lambda body, clamps: ChatFormat(body, header("chatcmpl"), service.token_text, clamps),
        None,
    )

    @app.post("/v1/completions", **_documented(CompletionRequest, CompletionResponse))
    async def create_completion(request: Request) -> Response:
        """Continue prompts."""
        return await respond(service, completions, request)

    @app.post("/v1/chat/completions", **_documented(ChatRequest, ChatResponse))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        return await respond(service, chat, request)


def _add_tokens(app: FastAPI, service: Service) -> None:
    llm = service.engine.llm

    @app.post("/tokenize", **_documented(TokenizeRequest, TokenizeResponse))
    async def tokenize(request: Request) -> Response:
        """Return the token ids of a prompt or a conversation."""
        with ExitStack() as stack:  # The reservation lasts, since the work takes time as well.
            body, _ = await service.read_body(request, TokenizeRequest, stack)
            prompt, param = (body.prompt, "prompt") if body.prompt else (body.messages, "messages")
            bos: Bos = "auto" if body.add_special_tokens else "off"
            (encoded,) = await service.encode([prompt], param, bos)
        ids = list(encoded.token_ids)
        return _json(
            TokenizeResponse(
                count=len(ids),
                max_model_len=service.max_model_len,
                tokens=ids,
                token_strs=list(map(service.token_text, ids)) if body.return_token_strs else None,
            )
        )

    @app.post("/detokenize", **_documented(DetokenizeRequest, DetokenizeResponse))
    async def detokenize(request: Request) -> Response:
        """Return the text of token ids."""
        with ExitStack() as stack:
            body, _ = await service.read_body(request, DetokenizeRequest, stack)
            size = llm.tokenizer.vocab_size
            for token in body.tokens:
                if token >= size:
                    raise bad_request(f"Token id {token} is not below {size}.", "tokens")
            text = await service.run(llm.decode, body.tokens)
        return _json(DetokenizeResponse(prompt=text))


def _add_models(app: FastAPI, service: Service) -> None:
    name = service.settings.model_name
    model = Model(
        id=name,
        object="model",
        created=service.created,
        owned_by="ee_llm",
        root=name,
        max_model_len=service.max_model_len,
        ee=model_exits(service.engine.llm),
    )

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """Return the models of this server."""
        return ModelList(object="list", data=[model])

    @app.get("/v1/models/{model_name:path}")
    async def retrieve_model(model_name: str) -> Model:
        """Return one model."""
        service.check_model(model_name)
        return model

    @app.get("/version")
    async def version() -> Version:
        """Return the version of ee_llm."""
        return Version(version=__version__)


def _add_probes(app: FastAPI, service: Service) -> None:
    def state(trouble: str | None) -> Response:
        return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Return metrics in Prometheus's format."""
        content, kind = service.metrics.export(request.headers.get("accept", "*/*"))
        return Response(content, media_type=kind)

    @app.get("/live", response_model=Health)
    async def live() -> Response:
        """Return 200 while the server responds."""
        return state(None)

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """Return 200 while the engine works."""
        return state(service.trouble)

    @app.get("/ready", response_model=Health)
    async def ready() -> Response:
        """Return 200 while the server takes requests."""
        return state("shutting down" if service.is_draining else service.trouble)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(UserError)
    async def on_user_error(_: Request, error: UserError) -> Response:
        return error_response(bad_request(str(error), None))

    @app.exception_handler(ClientDisconnect)  # while its body is read
    @app.exception_handler(ClientDisconnectedError)
    async def on_disconnect(_: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}."
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def on_exception(request: Request, error: Exception) -> Response:
        # uvicorn logs the traceback. The client must not see it.
        id = request.state.request_id
        logger.error("%s: internal error in %s", id, request.url.path)
        message = f"The server has failed. Its log has the reason, under {id}."
        headers = {"x-request-id": id}  # This response does not pass the middleware.
        return error_response(ApiError(500, message, code="internal_error", headers=headers))


def _json(response: BaseModel) -> Response:
    return Response(to_json(response), media_type="application/json")


def _documented(request: type[BaseModel], response: type[BaseModel]) -> dict[str, Any]:
    """Return the documentation of a route whose body is read by `read_body`."""
    schema = {"$ref": _SCHEMA_PATH.format(model=request.__name__)}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"openapi_extra": {"requestBody": body}, "responses": {200: {"model": response}}}


def _document_bodies(app: FastAPI) -> None:
    """Add the models of request bodies to the schema at /openapi.json."""
    kinds = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _, found = models_json_schema(
                [(kind, "validation") for kind in kinds], ref_template=_SCHEMA_PATH
            )
            schema = make()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
