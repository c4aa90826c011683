"""Attention by kernels that read keys and values where they lie, by tables of blocks.

`attention.attend` copies what a pass reads into one tensor first, which suits a CPU. A kernel over
pages copies nothing, and its arguments have the same shapes in every pass of as many rows, as CUDA
graphs need.

Legend of shapes: u rows that attend, n entries of them, k key/value heads, r queries per key/value
head, q = k * r, d head dimension.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention

from ee_llm.errors import RequestError

Attention = Literal["auto", "gather", "plain", "varlen", "flash"]
Kernel = Callable[[Tensor, Tensor, Tensor, "PagedBatch"], Tensor]

_HALF = (torch.float16, torch.bfloat16)
# What the paged kernel of flash-attn 2 divides blocks into.
FLASH_BLOCK = 256


@dataclass(frozen=True)
class PagedBatch:
    """The rows that attend, as entries: neighbouring rows of one sequence each.

    cu_seqlens_q [n + 1]: numbers of the entries' first rows, and of all rows. seqused_k [n]:
    positions that an entry's last row sees, itself included; rows before it see one less each.
    tables [n, blocks]: where their positions lie. All int32. max_seqlen_q: most rows of an entry;
    max_seqlen_k: most positions that any row can see. kernel: what mixes values, of queries [u, q,
    d] and the keys and values [blocks, block size, k, d].
    """

    cu_seqlens_q: Tensor
    seqused_k: Tensor
    tables: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_size: int
    kernel: Kernel


def attend_pages(queries: Tensor, pages: Tensor, paged: PagedBatch) -> Tensor:
    """Return the mixed values [u, q * d] of queries [u, k, r, d] over pages [c, 2, k, d]."""
    keys, values = pages.view(-1, paged.block_size, *pages.shape[1:]).unbind(2)
    return paged.kernel(queries.flatten(1, 2), keys, values, paged).flatten(1)


def plain(queries: Tensor, keys: Tensor, values: Tensor, paged: PagedBatch) -> Tensor:
    """Do what the kernels do, on any device in any dtype: their twin, which copies per row."""
    counts = paged.cu_seqlens_q.diff()
    entry = torch.arange(len(counts), device=queries.device).repeat_interleave(
        counts, output_size=len(queries)
    )
    later = paged.cu_seqlens_q[1:][entry] - 1 - torch.arange(len(queries), device=queries.device)
    seen = paged.seqused_k[entry] - later
    tables = paged.tables[entry]
    k, v = (part[tables].flatten(1, 2).transpose(1, 2) for part in (keys, values))  # [u, k, T, d]
    mask = torch.arange(k.shape[2], device=queries.device) < seen[:, None]
    # A masked value is multiplied by 0, which leaves NaN.
    k, v = (part.masked_fill(~mask[:, None, :, None], 0.0) for part in (k, v))
    mixed = F.scaled_dot_product_attention(
        queries[:, :, None], k, v, mask[:, None, None], enable_gqa=True
    )
    return mixed[:, :, 0]


def varlen(queries: Tensor, keys: Tensor, values: Tensor, paged: PagedBatch) -> Tensor:
    """torch's varlen_attn, by FlashAttention 3.

    With one split a row's outcome does not depend on which others are in the batch.
    """
    from torch.nn.attention.varlen import varlen_attn

    mixed = varlen_attn(
        queries,
        keys,
        values,
        paged.cu_seqlens_q,
        None,
        paged.max_seqlen_q,
        paged.max_seqlen_k,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=paged.seqused_k,
        block_table=paged.tables,
        num_splits=1,
    )
    assert isinstance(mixed, Tensor), "nothing else was asked for"
    return mixed


def flash(queries: Tensor, keys: Tensor, values: Tensor, paged: PagedBatch) -> Tensor:
    """flash-attn 2."""
    from flash_attn import flash_attn_varlen_func

    ends = F.pad(paged.seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
    mixed: Tensor = flash_attn_varlen_func(
        queries,
        keys,
        values,
        paged.cu_seqlens_q,
        ends,
        paged.max_seqlen_q,
        paged.max_seqlen_k,
        causal=True,
        block_table=paged.tables,
    )
    return mixed


_KERNELS: dict[str, Kernel] = {"plain": plain, "varlen": varlen, "flash": flash}


def choose(
    name: Attention, device: torch.device, dtype: torch.dtype, block_size: int
) -> Kernel | None:
    """Return the kernel of a name, None for "gather", which needs none; "auto": the best there is.

    dtype: of the cache. Raises RequestError, saying why, if the kernel can not be had here.
    """
    if name not in get_args(Attention):
        raise RequestError(
            f"attention {name!r} is unknown; choose of {', '.join(get_args(Attention))}"
        )
    if name == "auto":
        fit = (k for k in ("varlen", "flash") if _obstacle(k, device, dtype, block_size) is None)
        return _KERNELS.get(next(fit, "gather"))
    if obstacle := _obstacle(name, device, dtype, block_size):
        raise RequestError(f"attention {name!r} {obstacle}; take auto or gather")
    return _KERNELS.get(name)


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
    if name in ("gather", "plain"):
        return None
    if device.type == "cpu":
        return "needs a GPU"
    if dtype not in _HALF:
        return f"takes float16 and bfloat16, and this is {str(dtype).removeprefix('torch.')}"
    return _varlen_obstacle() if name == "varlen" else _flash_obstacle(block_size)


def _varlen_obstacle() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"is not in torch {torch.__version__}"
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return f"of torch {torch.__version__} takes no tables of blocks; 2.13 does"
    try:
        attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        return f"needs FlashAttention 3 (flash_attn_interface): {error}"
    return None


def _flash_obstacle(block_size: int) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn"
    if block_size % FLASH_BLOCK:
        return f"needs block_size to be a multiple of {FLASH_BLOCK}, and it is {block_size}"
    return None
