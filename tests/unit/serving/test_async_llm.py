"""Test `AsyncLLM`: its outputs equal those of `LLM`, and no request outlives its reader."""

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ee_llm.errors import RequestError, RunError
from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.serving.async_engine import AsyncTokenStream
from ee_llm.serving.async_llm import AsyncLLM
from tests.unit.serving.servers import save

LONG = SamplingParams(max_tokens=4900, ignore_eos=True)  # takes seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), max_seq_length=5000)


@pytest.fixture(scope="module")
def llm(run: Path) -> Iterator[LLM]:
    with LLM(run, dtype="float64") as llm:
        yield llm


def drive(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, which must not hang."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def idle(llm: LLM) -> None:
    """Wait until the engine has no work, and check that it has lost no block."""
    for _ in range(2000):
        if not llm.engine.has_work:
            break
        await asyncio.sleep(0.005)
    assert not llm.engine.has_work
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    "strategy", ["exact", "full", "propagate", "self-speculative", "sled", "dola"]
)
def test_outputs_equal_those_of_the_blocking_class(llm: LLM, strategy: Any) -> None:
    greedy = SamplingParams(max_tokens=12)
    seeded = SamplingParams(max_tokens=9, temperature=0.9, seed=5, n=2)
    options: Any = {"strategy": strategy}
    if strategy in ("exact", "propagate"):
        options["exits"] = {1: 0.2, 2: 0.3}
    expected = [llm.generate("Once", one, **options) for one in (greedy, seeded)]

    async def main() -> list[Any]:
        async with AsyncLLM(llm) as engine:
            return await asyncio.gather(
                *(engine.generate("Once", one, **options) for one in (greedy, seeded))
            )

    found = drive(main())
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
        assert [one.exits for one in ours] == [one.exits for one in theirs]
        assert [one.text for one in ours] == [one.text for one in theirs]
        assert [one.index for one in ours] == [one.index for one in theirs]


def test_a_stream_yields_the_tokens_of_the_output(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, stop="e", logprobs=2)
    (expected,) = llm.generate("Once", params)

    async def main() -> None:
        async with AsyncLLM(llm) as engine, await engine.stream("Once", params) as stream:
            tokens = [token async for token in stream]
            assert stream.output is not None
            assert "".join(token.text for token in tokens) == stream.output.text == expected.text
            assert tuple(token.token_id for token in tokens) == expected.token_ids
            assert tuple(token.top_logprobs for token in tokens) == expected.top_logprobs
            assert stream.output.prompt == "Once"
            assert [token async for token in stream] == []

    drive(main())


@pytest.mark.parametrize("how", ["close", "context", "drop", "cancel"])
def test_an_unfinished_stream_aborts_its_request(llm: LLM, how: str) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            stream = await engine.stream("Once", LONG)
            await anext(stream)
            assert llm.engine.has_work
            if how == "close":
                stream.close()
            elif how == "context":
                async with stream:
                    await anext(stream)
            elif how == "cancel":
                task = asyncio.create_task(read(stream))
                await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
            kept = None if how == "drop" else stream  # Its destructor aborts the request as well.
            del stream
            gc.collect()
            await idle(llm)
            del kept

    drive(main())


async def read(stream: AsyncTokenStream) -> None:
    async for _ in stream:
        pass


def test_a_cancelled_task_aborts_its_requests(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            params = replace(LONG, n=3)
            task = asyncio.create_task(engine.generate("Once", params))
            while not llm.engine.has_work:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            await idle(llm)

    drive(main())


def test_a_cancelled_submission_leaves_no_request(llm: LLM) -> None:
    """At whatever moment: before the thread takes the request, while it does, and after."""

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            request = llm.encode_prompt("Once")
            for number in range(200):
                made = llm.make_request(request, LONG)
                task = asyncio.create_task(engine.submit(made, "Once"))
                for _ in range(number % 10):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                del task
            gc.collect()
            await idle(llm)

    drive(main())


def test_a_slow_reader_is_aborted_with_a_reason(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm, max_unread_tokens=5) as engine:
            stream = await engine.stream("Once", LONG)
            await idle(llm)
            with pytest.raises(RunError, match="were unread, more than max_unread_tokens = 5"):
                await anext(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    drive(main())


def test_a_failure_of_the_engine_ends_all_streams(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            streams = [await engine.stream(prompt, LONG) for prompt in ("a", "b")]
            for stream in streams:
                await anext(stream)

            def fail() -> None:
                raise ValueError("broken")

            monkeypatch.setattr(llm.engine, "_advance", fail)
            for stream in streams:
                with pytest.raises(RunError, match="The engine failed: ValueError: broken"):
                    async for _ in stream:
                        pass
            assert engine.error is not None
            assert "broken" in engine.error
            with pytest.raises(RunError, match="broken"):
                await engine.stream("c", LONG)
            assert engine.seconds_in_step == 0.0

    drive(main())


def test_closing_ends_the_streams(run: Path) -> None:
    """Of an `AsyncLLM`, and of the `LLM` below one."""

    async def main(closes_model: bool) -> None:
        llm = LLM(run, dtype="float64")
        engine = AsyncLLM(llm)
        stream = await engine.stream("Once", LONG)
        await (asyncio.to_thread(llm.close) if closes_model else engine.close())
        with pytest.raises(RunError, match="aborted" if closes_model else "closed"):
            async for _ in stream:
                pass
        await engine.close()
        with pytest.raises(RunError, match="closed"):
            await engine.stream("Once", LONG)

    drive(main(False))
    drive(main(True))


def test_a_model_that_it_has_loaded_is_closed(run: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(run, dtype="float64") as engine:
            assert len(await engine.generate([1, 2], SamplingParams(max_tokens=2, n=2))) == 2
        assert "closed" in repr(engine.llm)

    drive(main())
    with pytest.raises(RequestError, match="dtype is an argument of LLM"), LLM(run) as llm:
        AsyncLLM(llm, dtype="float64")


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", SamplingParams(), "empty text"),
        ([300], SamplingParams(), "Token id 300"),
        ([1] * 5001, SamplingParams(), "more than model.max_seq_length"),
        ("a", SamplingParams(stop_token_ids=[999]), "stop_token_ids"),
        ("a", SamplingParams(n=2), "n = 2"),
    ],
)
def test_invalid_requests_are_refused_at_once(
    llm: LLM, prompt: Any, params: SamplingParams, message: str
) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(RequestError, match=message):
                await engine.stream(prompt, params)
            assert not llm.engine.has_work

    drive(main())


def test_a_request_too_large_for_the_cache_is_refused(run: Path) -> None:
    async def main() -> None:
        with LLM(run, dtype="float64", cache_tokens=1, max_num_seqs=1) as llm:
            async with AsyncLLM(llm) as engine:
                with pytest.raises(RequestError, match="the cache has"):
                    await engine.stream("Once", LONG)

    drive(main())


def test_the_thread_sleeps_without_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda: steps.append(None) or step())

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            await engine.generate("Once", SamplingParams(max_tokens=2))
            count = len(steps)
            await asyncio.sleep(0.2)
            assert len(steps) == count

    drive(main())
