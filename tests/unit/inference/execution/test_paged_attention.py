"""Attention over pages: the plain twin against the formula, and what kernels are given."""

import inspect
import random
import sys
from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from ee_llm.inference.execution import paged_attention
from ee_llm.inference.execution.attention import BlockTable, Run, attend
from ee_llm.inference.execution.paged_attention import Kernel, choose, flash, plain, varlen
from tests.unit.inference.execution.test_attention import HEADS, NUM_SLOTS, PATHS, SIZE, Cache, Path

CPU = torch.device("cpu")


def over_pages(cache: Cache, kernel: Kernel) -> Cache:
    """Let a cache be read by a kernel over pages."""
    before = cache.table
    cache.table = BlockTable(NUM_SLOTS, 8, SIZE, CPU, kernel)
    for slot, blocks in enumerate(before._blocks):
        for index, block in enumerate(blocks):
            cache.table.set(slot, index, block)
    return cache


def _check(cache: Cache, live: list[Run] | None, by_row: bool) -> None:
    cache.batch()  # which writes the new keys and values
    batch = cache.table.batch(cache.runs, live, cache.dtype, by_row)
    runs = cache.runs if live is None else live
    queries = cache.queries if live is None else cache.queries[batch.live]
    numbers = accumulate((run.num_rows for run in runs), initial=0)
    expected = cache.expected(runs)
    assert batch.paged is not None
    assert batch.paged.max_seqlen_q == (1 if by_row else max(run.num_rows for run in runs))
    assert len(list(numbers)) == len(runs) + 1
    found = attend(queries, cache.pages, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("num_kv", "per_kv"), HEADS)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_the_plain_twin_gives_what_the_formula_does(
    path: Path, num_kv: int, per_kv: int, by_row: bool
) -> None:
    _check(over_pages(Cache(path.rows, num_kv, per_kv), plain), None, by_row)


@pytest.mark.parametrize("seed", range(10))
def test_rows_that_do_not_live_do_not_attend(seed: int) -> None:
    rng = random.Random(seed)
    path = rng.choice([path for path in PATHS if path.rows[0].stop > 4])
    cache = over_pages(Cache(path.rows), plain)
    live = [
        Run(run.slot, run.start + index, run.start + index + 1, run.first + index)
        for run in cache.runs
        for index in range(run.num_rows)
        if rng.random() < 0.6 or index == 0
    ]
    _check(cache, live, by_row=False)


def _by_kernel_arguments(
    q: Tensor, keys: Tensor, values: Tensor, ends: Tensor, seen: Tensor, tables: Tensor
) -> Tensor:
    """Return causal attention by the arguments that kernels take, one row after the other.

    The last of an entry's queries sees all `seen` positions (aligned at the bottom right).
    """
    mixed = torch.empty_like(q)
    per_kv = q.shape[1] // keys.shape[2]
    for entry, (first, last) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        k, v = (part[tables[entry]].flatten(0, 1) for part in (keys, values))
        for row in range(first, last):
            count = int(seen[entry]) - (last - 1 - row)
            for head in range(q.shape[1]):
                one = k[:count, head // per_kv], v[:count, head // per_kv]
                weights = (one[0] @ q[row, head] / q.shape[2] ** 0.5).softmax(0)
                mixed[row, head] = weights @ one[1]
    return mixed


def _bound(signature: inspect.Signature, *args: Any, **options: Any) -> SimpleNamespace:
    bound = signature.bind(*args, **options)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def _as_varlen(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Put in the place of torch's kernel a slow one with its signature."""
    signature = inspect.signature(torch_varlen.varlen_attn)

    def stand_in(*args: Any, **options: Any) -> Tensor:
        one = _bound(signature, *args, **options)
        assert one.window_size == (-1, 0), "causal"
        assert (one.num_splits, one.enable_gqa, one.cu_seq_k) == (1, True, None)
        assert {t.dtype for t in (one.cu_seq_q, one.seqused_k, one.block_table)} == {torch.int32}
        assert one.max_q >= one.cu_seq_q.diff().max()
        assert one.max_k >= one.seqused_k.max()
        return _by_kernel_arguments(
            one.query, one.key, one.value, one.cu_seq_q, one.seqused_k, one.block_table
        )

    monkeypatch.setattr(torch_varlen, "varlen_attn", stand_in)
    return varlen


def _as_flash(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Put in the place of flash-attn's kernel a slow one with its signature."""

    def stand_in(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        assert causal
        assert block_table is not None
        assert (cu_seqlens_k.dtype, block_table.dtype) == (torch.int32, torch.int32)
        assert (dropout_p, softmax_scale) == (0.0, None)
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        return _by_kernel_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table)

    module = SimpleNamespace(flash_attn_varlen_func=stand_in)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return flash


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("stand_in", [_as_varlen, _as_flash])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_kernels_are_given_what_they_document(
    path: Path,
    stand_in: Callable[[pytest.MonkeyPatch], Kernel],
    by_row: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "block_table" not in inspect.signature(torch_varlen.varlen_attn).parameters:
        pytest.skip("this torch has no tables of blocks")
    _check(over_pages(Cache(path.rows), stand_in(monkeypatch)), None, by_row)


def test_a_cpu_gathers_unless_told_otherwise() -> None:
    assert choose("auto", CPU, torch.bfloat16, 16) is None
    assert choose("gather", CPU, torch.bfloat16, 16) is None
    assert choose("plain", CPU, torch.float64, 16) is plain


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("varlen", "cpu", torch.bfloat16, "needs a GPU; take auto or gather"),
        ("flash", "cpu", torch.bfloat16, "needs a GPU"),
        ("varlen", "meta", torch.float32, "takes float16 and bfloat16, and this is float32"),
        ("flash", "meta", torch.bfloat16, "flash-attn"),
        ("fast", "cpu", torch.bfloat16, "'fast' is unknown; choose of auto, gather"),
    ],
)
def test_a_kernel_that_can_not_be_had_is_refused_with_the_reason(
    name: str, device: str, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(name, torch.device(device), dtype, 16)  # type: ignore[arg-type]


def test_flash_attn_2_asks_for_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention.importlib.util, "find_spec", lambda name: object())
    device = torch.device("meta")  # stands for any but a CPU
    assert choose("flash", device, torch.bfloat16, 256) is flash
    with pytest.raises(ValueError, match="block_size to be a multiple of 256, and it is 16"):
        choose("flash", device, torch.bfloat16, 16)


def test_torch_needs_flash_attention_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError("No module named 'flash_attn_interface'")

    if "block_table" not in inspect.signature(torch_varlen.varlen_attn).parameters:
        pytest.skip("this torch has no tables of blocks")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", absent)
    with pytest.raises(ValueError, match="needs FlashAttention 3 .flash_attn_interface"):
        choose("varlen", torch.device("meta"), torch.bfloat16, 16)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: None)
    assert choose("varlen", torch.device("meta"), torch.bfloat16, 16) is varlen
    assert choose("auto", torch.device("meta"), torch.bfloat16, 16) is varlen
