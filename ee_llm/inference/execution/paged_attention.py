"""Compute attention with kernels that read keys and values in place, through block tables.

`attention.attend` first copies the keys and values of a pass into one tensor, which suits a CPU. A
paged kernel copies nothing, and the shapes of its arguments depend only on the number of rows, as
CUDA graphs require.

Legend of shapes: u rows that attend, n entries that they form, k key/value heads, r queries per
key/value head, q = k * r, d head dimension, T positions read.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention

from ee_llm.errors import RequestError
from ee_llm.inference.choices import Attention

Kernel = Callable[[Tensor, Tensor, Tensor, "PagedBatch"], Tensor]

_HALF = (torch.float16, torch.bfloat16)
# flash-attn 2 requires block sizes that are multiples of this.
FLASH_BLOCK = 256


@dataclass(frozen=True)
class PagedBatch:
    """Arguments of a paged kernel; each entry is consecutive rows of one sequence.

    Attributes:
        cu_seqlens_q: First row of each entry, and the number of all rows, int32 [n + 1].
        seqused_k: Number of positions that the last row of each entry sees, itself included, int32
            [n]; each row before it sees one less.
        block_table: Blocks of each entry's sequence, int32 [n, blocks].
        max_seqlen_q: Greatest number of rows of an entry.
        max_seqlen_k: Greatest number of positions that any row can see.
        block_size: Positions in a block.
        kernel: The kernel; it takes queries [u, q, d] and keys and values [blocks, block size, k,
            d].
    """

    cu_seqlens_q: Tensor
    seqused_k: Tensor
    block_table: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_size: int
    kernel: Kernel


def attend_pages(queries: Tensor, pages: Tensor, paged: PagedBatch) -> Tensor:
    """Return the attention output [u, q * d] of queries [u, k, r, d] over pages [c, 2, k, d]."""
    keys, values = pages.view(-1, paged.block_size, *pages.shape[1:]).unbind(2)
    return paged.kernel(queries.flatten(1, 2), keys, values, paged).flatten(1)


def plain(queries: Tensor, keys: Tensor, values: Tensor, paged: PagedBatch) -> Tensor:
    """Compute the result of the kernels on any device in any dtype, with a copy for each row."""
    counts = paged.cu_seqlens_q.diff()
    entry = torch.arange(len(counts), device=queries.device).repeat_interleave(
        counts, output_size=len(queries)
    )
    num_later = (
        paged.cu_seqlens_q[1:][entry] - 1 - torch.arange(len(queries), device=queries.device)
    )
    num_seen = paged.seqused_k[entry] - num_later
    table = paged.block_table[entry]
    k, v = (part[table].flatten(1, 2).transpose(1, 2) for part in (keys, values))  # [u, k, T, d]
    mask = torch.arange(k.shape[2], device=queries.device) < num_seen[:, None]
    # Attention multiplies masked values by 0, which keeps NaN.
    k, v = (part.masked_fill(~mask[:, None, :, None], 0.0) for part in (k, v))
    output = F.scaled_dot_product_attention(
        queries[:, :, None], k, v, mask[:, None, None], enable_gqa=True
    )
    return output[:, :, 0]


def varlen(queries: Tensor, keys: Tensor, values: Tensor, paged: PagedBatch) -> Tensor:
    """Run torch's varlen_attn with FlashAttention 3.

    With one split, the output of a row does not depend on the other rows of the batch.
    """
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
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
        block_table=paged.block_table,
        num_splits=1,
    )
    assert isinstance(output, Tensor), "no other output was requested"
    return output


def flash(queries: Tensor, keys: Tensor, values: Tensor, paged: PagedBatch) -> Tensor:
    """Run flash-attn 2."""
    from flash_attn import flash_attn_varlen_func

    ends = F.pad(paged.seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
    output: Tensor = flash_attn_varlen_func(
        queries,
        keys,
        values,
        paged.cu_seqlens_q,
        ends,
        paged.max_seqlen_q,
        paged.max_seqlen_k,
        causal=True,
        block_table=paged.block_table,
    )
    return output


_KERNELS: dict[str, Kernel] = {"plain": plain, "varlen": varlen, "flash": flash}


def choose_kernel(
    name: Attention, device: torch.device, dtype: torch.dtype, block_size: int
) -> Kernel | None:
    """Return the paged kernel of a name; None for "gather", which needs none.

    Args:
        name: Name of the kernel; "auto" selects the best one of the device.
        device: Device of the cache.
        dtype: Dtype of the cache.
        block_size: Positions in a block.

    Raises:
        RequestError: The name is unknown, or the kernel is not available here.
    """
    if name not in get_args(Attention):
        raise RequestError(
            f"attention {name!r} is unknown. Use one of {', '.join(get_args(Attention))}."
        )
    if name == "auto":
        names = ("varlen", "flash")
        usable = (k for k in names if _obstacle(k, device, dtype, block_size) is None)
        return _KERNELS.get(next(usable, "gather"))
    if obstacle := _obstacle(name, device, dtype, block_size):
        raise RequestError(f"attention {name!r} {obstacle}. Use auto or gather.")
    return _KERNELS.get(name)


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
    """Return why a kernel is not available here; None if it is."""
    if name in ("gather", "plain"):
        return None
    if device.type == "cpu":
        return "needs a GPU"
    if dtype not in _HALF:
        return f"needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return _varlen_obstacle() if name == "varlen" else _flash_obstacle(block_size)


def _varlen_obstacle() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"does not exist in torch {torch.__version__}"
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return f"takes no block table in torch {torch.__version__} (in 2.13 it does)"
    try:
        attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        return f"needs FlashAttention 3 (flash_attn_interface): {error}"
    return None


def _flash_obstacle(block_size: int) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn"
    if block_size % FLASH_BLOCK:
        return f"needs a block_size that is a multiple of {FLASH_BLOCK}, not {block_size}"
    return None
