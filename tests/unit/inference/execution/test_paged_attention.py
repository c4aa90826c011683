"""Paged attention: the plain kernel against the formula, and the arguments of other kernels."""

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
from ee_llm.inference.execution.paged_attention import Kernel, choose_kernel, flash, plain, varlen
from tests.unit.inference.execution.test_attention import HEADS, NUM_SLOTS, PATHS, SIZE, Cache, Path

CPU = torch.device("cpu")


def over_pages(cache: Cache, kernel: Kernel) -> Cache:
    """Make a cache use a paged kernel."""
    before = cache.table
    cache.table = BlockTable(NUM_SLOTS, 8, SIZE, CPU, kernel)
    for slot, blocks in enumerate(before._blocks):
        for index, block in enumerate(blocks):
            cache.table.set(slot, index, block)
    return cache


def _check(cache: Cache, live: list[Run] | None, by_row: bool) -> None:
    cache.batch()  # writes the new keys and values
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
def test_the_plain_kernel_gives_the_result_of_the_formula(
    path: Path, num_kv: int, per_kv: int, by_row: bool
) -> None:
    _check(over_pages(Cache(path.rows, num_kv, per_kv), plain), None, by_row)


@pytest.mark.parametrize("seed", range(10))
def test_frozen_rows_do_not_attend(seed: int) -> None:
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
    """Return causal attention from the arguments that kernels take, row by row.

    The last query of an entry sees all `seen` positions (bottom-right alignment).
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
    """Replace torch's kernel by a slow one with the same signature."""
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
    """Replace flash-attn's kernel by a slow one with the same signature."""

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
def test_kernels_get_the_arguments_that_they_document(
    path: Path,
    stand_in: Callable[[pytest.MonkeyPatch], Kernel],
    by_row: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "block_table" not in inspect.signature(torch_varlen.varlen_attn).parameters:
        pytest.skip("this torch has no block tables")
    _check(over_pages(Cache(path.rows), stand_in(monkeypatch)), None, by_row)


def test_a_cpu_gathers_by_default() -> None:
    assert choose_kernel("auto", CPU, torch.bfloat16, 16) is None
    assert choose_kernel("gather", CPU, torch.bfloat16, 16) is None
    assert choose_kernel("plain", CPU, torch.float64, 16) is plain


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("varlen", "cpu", torch.bfloat16, "attention 'varlen' needs a GPU"),
        ("flash", "cpu", torch.bfloat16, "needs a GPU"),
        ("varlen", "meta", torch.float32, "attention 'varlen' .* not float32"),
        ("flash", "meta", torch.bfloat16, "flash-attn"),
        ("fast", "cpu", torch.bfloat16, "'fast' is unknown.*auto, gather"),
    ],
)
def test_an_unavailable_kernel_is_refused_with_the_reason(
    name: str, device: str, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_kernel(name, torch.device(device), dtype, 16)  # type: ignore[arg-type]


def test_flash_attn_2_needs_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention.importlib.util, "find_spec", lambda name: object())
    device = torch.device("meta")  # stands for any device but a CPU
    assert choose_kernel("flash", device, torch.bfloat16, 256) is flash
    with pytest.raises(ValueError, match="block_size .* multiple of 256, not 16"):
        choose_kernel("flash", device, torch.bfloat16, 16)


def test_torch_needs_flash_attention_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError("No module named 'flash_attn_interface'")

    if "block_table" not in inspect.signature(torch_varlen.varlen_attn).parameters:
        pytest.skip("this torch has no block tables")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", absent)
    with pytest.raises(ValueError, match="needs FlashAttention 3 .flash_attn_interface"):
        choose_kernel("varlen", torch.device("meta"), torch.bfloat16, 16)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: None)
    assert choose_kernel("varlen", torch.device("meta"), torch.bfloat16, 16) is varlen
    assert choose_kernel("auto", torch.device("meta"), torch.bfloat16, 16) is varlen
