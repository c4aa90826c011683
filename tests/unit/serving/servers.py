"""Models and servers for tests."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn

from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.inference.llm import LLM
from ee_llm.serving.app import create_app
from ee_llm.serving.async_llm import AsyncLLM
from ee_llm.serving.server import allowed_hosts, bind, url_of
from ee_llm.serving.service import Service
from ee_llm.serving.settings import ServerSettings
from tests.unit.inference.models import random_tensors, tiny_config

NAME = "tiny"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
EXITS = {"thresholds": {"1": 0.2, "2": 0.3}, "return_exits": True}
EXITS_OF_LLM = {1: 0.2, 2: 0.3}


def save(output: Path, **config: object) -> Path:
    """Write a checkpoint of a random model whose tokens are bytes."""
    made = tiny_config(**{"vocab_size": 264, "max_seq_length": 64} | config)
    tensors = random_tensors(made, dtype=torch.float32)
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return write_checkpoint(output, made, specs, tensors.__getitem__, tokenizer_file="bytes")


def save_template(folder: Path) -> Path:
    path = folder / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@dataclass(frozen=True)
class Running:
    """A server on a free port of this machine, in a thread."""

    url: str
    service: Service

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """Send a body: an object, or the bytes of one."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        return httpx.post(f"{self.url}{path}", content=content, headers=headers, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", **options)

    def wait_until_idle(self) -> None:
        """Wait until the engine has no request, and check that it has lost no block."""
        engine = self.service.engine.llm.engine
        wait_for(lambda: not engine.has_work and not self.service.admission.num_requests)
        engine.scheduler.check_integrity()
        admission = self.service.admission
        assert (admission.num_sequences, admission.num_tokens, admission.num_bytes) == (0, 0, 0)


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextmanager
def running(
    llm: LLM, *, max_unread_tokens: int = 8192, send_buffer: int = 0, **settings: Any
) -> Iterator[Running]:
    """Serve a model with uvicorn while the context lasts; send_buffer: size of sockets' buffers."""
    engine = AsyncLLM(llm, max_unread_tokens=max_unread_tokens)
    service = Service(engine, ServerSettings(**{"model_name": NAME} | settings))
    bound = bind("127.0.0.1", 0)
    app = create_app(service, allowed_hosts(bound, "127.0.0.1", service.settings))
    config = uvicorn.Config(app, http="h11", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    if send_buffer:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Running(url_of(bound), service)
    finally:
        asyncio.run(engine.close())  # Responses in progress end.
        server.should_exit = True
        thread.join()
        service.close()
