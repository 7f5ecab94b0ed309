"""Attention on a paged, quantized cache: append new tokens, decode one token per sequence, prefill many.

Torch operators (`atom::kv_append`, `atom::attention_decode`, the two in one `atom::attention_append_decode`,
`atom::attention_prefill`), so that torch.compile and CUDA graphs can hold them. Where no kernel serves (`why_not`), the
reference runs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.kernels import attention_launch, compiler, dispatch, prefill_launch
from atomcli.kernels import attention_reference as reference
from atomcli.kernels.attention_reference import Rope
from atomcli.kernels.pages import PageFormat


def append(
    pool: Tensor,
    fmt: PageFormat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    hadamard: bool = False,
    rotate_keys: bool = True,
    center: Tensor | None = None,
) -> Tensor:
    """Rotate the queries of T tokens and store their keys and values; returns the rotated queries (T, Hq, D).

    query (T, Hq, D), key and value (T, Hkv, D) bf16, fp16 or fp32; cos and sin fp32 (T, D / 2); slots int64 (T,):
    page * fmt.page + offset, negative for a token that is not stored. Queries get RoPE and then, with `hadamard`, the
    Hadamard over head_dim; keys the same, but for RoPE without `rotate_keys`, and less `center`, fp32 (Hkv, D) in that
    basis: the softmax doesn't notice that what all keys of a head share is missing. The tokens may belong to any
    sequences.
    Raises UnsupportedError for shapes or dtypes that don't fit each other.
    """
    _check(query, pool, fmt)
    _check_new(query, pool, fmt, key, value, cos, sin, slots, center)
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _operator("kv_append")(
        pool, fmt.element, fmt.page, query, key, value, cos, sin, slots, hadamard, rotate_keys, center, rotated
    )
    return rotated


def decode(
    query: Tensor,
    pool: Tensor,
    fmt: PageFormat,
    page_table: Tensor,
    lengths: Tensor,
    scaling: float,
    window: int | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    rope: Rope | None = None,
    out: Tensor | None = None,
    *,
    hadamard: bool = False,
    keys_rotated: bool = True,
    settled: bool = False,
) -> Tensor:
    """Attention of one query per sequence, (B, Hq, D) -> (B, Hq, D), over the keys its pages hold.

    query as `append` returned it. page_table int32 (B, max_pages): page p of a row holds its tokens from p * fmt.page,
    and key j has position j. lengths int32 (B,): keys per sequence, the query's own included; an idle row has 0 and
    comes out zero. window: keys that a query sees, itself included. key_bias fp32 (Hkv, D), unrotated, is added back to
    keys that were stored without it, at each key's position; value_bias fp32 (Hkv, D) is added to what was attended.
    rope: fp32 (positions, D / 2) cosines and sines of every position, needed with key_bias or unrotated keys.
    hadamard, keys_rotated: what `append` was told. settled: lengths and page_table were written before the kernel
    before this one, so that they may be read while that one still runs. Nothing depends on the values of lengths but
    the result: one CUDA graph serves them all. Raises UnsupportedError for shapes or dtypes that don't fit each other.
    """
    _check(query, pool, fmt)
    _check_sequences(query, out, page_table, lengths, key_bias, value_bias, rope, keys_rotated)
    if len(lengths) != len(query):
        raise UnsupportedError(f"{len(query)} queries need as many lengths, not {len(lengths)}.")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    cos, sin = (None, None) if rope is None else rope
    _operator("attention_decode")(
        query, pool, fmt.element, fmt.page, page_table, lengths, scaling, window, key_bias, value_bias, cos, sin,
        hadamard, keys_rotated, settled, out,
    )  # fmt: skip
    return out


def append_and_decode(
    pool: Tensor,
    fmt: PageFormat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scaling: float,
    window: int | None = None,
    value_bias: Tensor | None = None,
    *,
    hadamard: bool = False,
    center: Tensor | None = None,
    settled: bool = False,
) -> Tensor:
    """`append` of one token per sequence and `decode` over it and what is cached, (B, Hq, D).

    Of few sequences in one kernel. The same arguments and the same numbers; a slot is that of its sequence's last key,
    lengths[b] - 1, or the sequence is idle. For keys that are cached after RoPE, and no key biases.
    """
    _check(query, pool, fmt)
    _check_new(query, pool, fmt, key, value, cos, sin, slots, center)
    _check_sequences(query, None, page_table, lengths, None, value_bias, None, True)
    if len(lengths) != len(query):
        raise UnsupportedError(f"{len(query)} queries need as many lengths, not {len(lengths)}.")
    if not _in_one_kernel(fmt, query, pool):
        query = append(pool, fmt, query, key, value, cos, sin, slots, hadamard, True, center)
        return decode(
            query, pool, fmt, page_table, lengths, scaling, window, None, value_bias, hadamard=hadamard, settled=settled
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _operator("attention_append_decode")(
        pool, fmt.element, fmt.page, query, key, value, cos, sin, slots, center, page_table, lengths, scaling, window,
        value_bias, hadamard, settled, out,
    )  # fmt: skip
    return out


def _in_one_kernel(fmt: PageFormat, query: Tensor, pool: Tensor) -> bool:
    """Whether it pays, on a card; the reference is the same either way."""
    if not query.is_cuda:
        return True
    processors = compiler.multiprocessors(query.device)
    return attention_launch.is_one_wave(fmt, len(query), query.shape[1], pool.shape[1], processors)


def prefill(
    query: Tensor,
    pool: Tensor,
    fmt: PageFormat,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scaling: float,
    window: int | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    rope: Rope | None = None,
    out: Tensor | None = None,
    *,
    hadamard: bool = False,
    keys_rotated: bool = True,
) -> Tensor:
    """Causal attention of the last queries of each sequence, (T, Hq, D) -> (T, Hq, D), over the keys its pages hold.

    query_starts int32 (B + 1,): sequence b owns queries query_starts[b] up to query_starts[b + 1], and the last of them
    is its last key: a chunk of a prompt, or one that continues a shared prefix, has just fewer queries than there are
    keys, lengths int32 (B,). The rest as in `decode`.
    """
    _check(query, pool, fmt)
    _check_sequences(query, out, page_table, lengths, key_bias, value_bias, rope, keys_rotated)
    if query_starts.shape != (len(lengths) + 1,) or query_starts.dtype != torch.int32 or query_starts.stride(0) != 1:
        raise UnsupportedError(f"query_starts must be int32 ({len(lengths) + 1},), not {tuple(query_starts.shape)}.")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    cos, sin = (None, None) if rope is None else rope
    _operator("attention_prefill")(
        query, pool, fmt.element, fmt.page, page_table, query_starts, lengths, scaling, window, key_bias, value_bias,
        cos, sin, hadamard, keys_rotated, out,
    )  # fmt: skip
    return out


def why_not(
    fmt: PageFormat,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    keys_rotated: bool = True,
    group: int = 1,
) -> str | None:
    """Why the reference attends to these pages on `device`, or None where the kernels do.

    group: query heads that share a KV head.
    """
    return _machine_reason(torch.device(device)) or attention_launch.why_not(fmt, dtype, keys_rotated, group)


def _check(query: Tensor, pool: Tensor, fmt: PageFormat) -> None:
    if query.dim() != 3 or query.shape[2] != fmt.head_dim:
        raise UnsupportedError(f"Queries are (tokens, heads, {fmt.head_dim}), not {tuple(query.shape)}.")
    if pool.dim() != 3 or pool.shape[2] != fmt.bytes or pool.dtype != torch.uint8 or not pool.is_contiguous():
        raise UnsupportedError(f"A pool is contiguous uint8 (pages, heads, {fmt.bytes}), not {tuple(pool.shape)}.")
    if query.shape[1] % pool.shape[1]:
        raise UnsupportedError(f"{query.shape[1]} query heads can't share {pool.shape[1]} KV heads evenly.")


def _check_new(
    query: Tensor,
    pool: Tensor,
    fmt: PageFormat,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    center: Tensor | None,
) -> None:
    tokens, head_dim, kv_heads = query.shape[0], fmt.head_dim, pool.shape[1]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != (tokens, kv_heads, head_dim) or tensor.dtype != query.dtype:
            raise UnsupportedError(
                f"The {name} is {tensor.dtype} {tuple(tensor.shape)}; the queries and the pool need "
                f"{query.dtype} {(tokens, kv_heads, head_dim)}."
            )
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.shape != (tokens, head_dim // 2) or tensor.dtype != torch.float32:
            raise UnsupportedError(f"{name} must be fp32 {(tokens, head_dim // 2)}, not {tuple(tensor.shape)}.")
    if slots.shape != (tokens,) or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise UnsupportedError(f"Slots must be int64 ({tokens},), not {slots.dtype} {tuple(slots.shape)}.")
    if center is not None and (center.shape != (kv_heads, head_dim) or center.dtype != torch.float32):
        raise UnsupportedError(f"The center must be fp32 {(kv_heads, head_dim)}, not {tuple(center.shape)}.")


def _check_sequences(
    query: Tensor,
    out: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    rope: Rope | None,
    keys_rotated: bool,
) -> None:
    if page_table.dim() != 2 or len(page_table) != len(lengths):
        raise UnsupportedError(f"{len(lengths)} sequences need a page table of as many rows, not {page_table.shape}.")
    if page_table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise UnsupportedError(f"page_table and lengths are int32, not {page_table.dtype} and {lengths.dtype}.")
    if page_table.stride(1) != 1 or not lengths.is_contiguous():
        raise UnsupportedError("The rows of page_table and the lengths must be contiguous.")
    if out is not None and (out.shape != query.shape or out.dtype != query.dtype or not out.is_contiguous()):
        raise UnsupportedError(
            f"The output must be contiguous {query.dtype} {tuple(query.shape)}, not {tuple(out.shape)}."
        )
    if rope is None and (key_bias is not None or not keys_rotated):
        raise UnsupportedError("A key bias, or keys stored before RoPE, need the rope tables.")
    tables = {"key_bias": key_bias, "value_bias": value_bias, "cosines": rope and rope[0], "sines": rope and rope[1]}
    for name, table in tables.items():
        if table is not None and (table.dtype != torch.float32 or not table.is_contiguous()):
            raise UnsupportedError(
                f"The {name} must be contiguous fp32, not {table.dtype} of strides {table.stride()}."
            )


# ---------------------------------------------------------------------------------------------- operators


def _append(
    pool: Tensor, element: str, page: int, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    slots: Tensor, hadamard: bool, rotate_keys: bool, center: Tensor | None, rotated: Tensor,
) -> None:  # fmt: skip
    fmt = _format(element, query.shape[2], page)
    if not len(query):
        return
    if why_not(fmt, query.device) is None:
        load = attention_launch.load_on(query.device)
        attention_launch.launch_append(
            load,
            pool,
            fmt,
            query,
            key,
            value,
            cos.contiguous(),
            sin.contiguous(),
            slots,
            hadamard,
            rotate_keys,
            None if center is None else center.contiguous(),
            rotated,
        )
    else:
        rotated.copy_(reference.append(pool, fmt, query, key, value, cos, sin, slots, hadamard, rotate_keys, center))


def _decode(
    query: Tensor, pool: Tensor, element: str, page: int, page_table: Tensor, lengths: Tensor, scaling: float,
    window: int | None, key_bias: Tensor | None, value_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    hadamard: bool, keys_rotated: bool, settled: bool, out: Tensor,
) -> None:  # fmt: skip
    fmt, device = _format(element, query.shape[2], page), query.device
    if not len(query):
        return
    if why_not(fmt, device, query.dtype, keys_rotated, query.shape[1] // pool.shape[1]) is None:
        attention_launch.launch_decode(
            attention_launch.load_on(device), query, pool, fmt, page_table, lengths, scaling, window,
            attention_launch.Biases(key_bias, value_bias, cos, sin, hadamard), out, settled=settled, **_card(device),
        )  # fmt: skip
        return
    rope = None if cos is None or sin is None else (cos, sin)
    starts = torch.arange(len(lengths) + 1)
    reference.attend(
        query, pool, fmt, page_table, starts, lengths, scaling, window, key_bias, value_bias, rope, hadamard,
        keys_rotated, out,
    )  # fmt: skip


def _append_decode(
    pool: Tensor, element: str, page: int, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    slots: Tensor, center: Tensor | None, page_table: Tensor, lengths: Tensor, scaling: float, window: int | None,
    value_bias: Tensor | None, hadamard: bool, settled: bool, out: Tensor,
) -> None:  # fmt: skip
    fmt, device = _format(element, query.shape[2], page), query.device
    if not len(query):
        return
    if why_not(fmt, device, query.dtype, True, query.shape[1] // pool.shape[1]) is None:
        attention_launch.launch_decode(
            attention_launch.load_on(device), query, pool, fmt, page_table, lengths, scaling, window,
            attention_launch.Biases(value=value_bias), out, settled=settled, **_card(device),
            appended=attention_launch.Appended(key, value, cos.contiguous(), sin.contiguous(), slots, center, hadamard),
        )  # fmt: skip
        return
    rotated = reference.append(pool, fmt, query, key, value, cos, sin, slots, hadamard, True, center)
    starts = torch.arange(len(lengths) + 1)
    reference.attend(
        rotated, pool, fmt, page_table, starts, lengths, scaling, window, None, value_bias, None, hadamard, True, out
    )


@cache
def _card(device: torch.device) -> dict[str, Any]:
    """What the decode kernel's launch asks of a card."""
    arch = compiler.architecture(device)
    return {
        "processors": compiler.multiprocessors(device),
        "shared_limit": attention_launch.SHARED_LIMITS[arch],
    }


def _prefill(
    query: Tensor, pool: Tensor, element: str, page: int, page_table: Tensor, query_starts: Tensor, lengths: Tensor,
    scaling: float, window: int | None, key_bias: Tensor | None, value_bias: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, hadamard: bool, keys_rotated: bool, out: Tensor,
) -> None:  # fmt: skip
    fmt, device = _format(element, query.shape[2], page), query.device
    if not len(query):
        return
    if why_not(fmt, device, query.dtype, keys_rotated, query.shape[1] // pool.shape[1]) is None:
        arch, biases = compiler.architecture(device), attention_launch.Biases(key_bias, value_bias, cos, sin, hadamard)
        load, limit = attention_launch.load_on(device), attention_launch.SHARED_LIMITS[arch]
        operands = (load, query, pool, fmt, page_table, query_starts, lengths, scaling, window, biases, out)
        if prefill_launch.why_not(arch, query.shape[1] // pool.shape[1], biases, scaling) is None:
            processors = compiler.multiprocessors(device)
            prefill_launch.launch_warpgroups(*operands, processors=processors, shared_limit=limit)
        else:
            attention_launch.launch_prefill(*operands, shared_limit=limit)
        return
    rope = None if cos is None or sin is None else (cos, sin)
    reference.attend(
        query, pool, fmt, page_table, query_starts, lengths, scaling, window, key_bias, value_bias, rope, hadamard,
        keys_rotated, out,
    )  # fmt: skip


@cache
def _format(element: str, head_dim: int, page: int) -> PageFormat:
    return PageFormat(element, head_dim, page)  # type: ignore[arg-type]


@cache
def _machine_reason(device: torch.device) -> str | None:
    return dispatch.machine_reason(device)


def _nothing(*_: object) -> None:
    """Shapes of the results: the operators write into what they are given."""


_FUNCTIONS: dict[str, Callable[..., None]] = {
    "kv_append": _append,
    "attention_append_decode": _append_decode,
    "attention_decode": _decode,
    "attention_prefill": _prefill,
}


def _operator(name: str) -> Callable[..., Any]:
    """What torch.compile is to see as one node; otherwise what runs it, without torch's 20 µs of dispatch."""
    return getattr(torch.ops.atom, name) if torch.compiler.is_compiling() else _FUNCTIONS[name]


_SEQUENCES = (
    "Tensor lengths, float scaling, int? window, Tensor? key_bias, Tensor? value_bias, Tensor? cos, Tensor? sin, "
    "bool hadamard, bool keys_rotated, Tensor(a!) out) -> ()"
)
_library = torch.library.Library("atom", "FRAGMENT")
_library.define(
    "kv_append(Tensor(a!) pool, str element, int page, Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, "
    "Tensor slots, bool hadamard, bool rotate_keys, Tensor? center, Tensor(b!) rotated) -> ()"
)
_library.define(
    "attention_append_decode(Tensor(a!) pool, str element, int page, Tensor query, Tensor key, Tensor value, "
    "Tensor cos, Tensor sin, Tensor slots, Tensor? center, Tensor page_table, Tensor lengths, float scaling, "
    "int? window, Tensor? value_bias, bool hadamard, bool settled, Tensor(b!) out) -> ()"
)
_library.define(
    "attention_decode(Tensor query, Tensor pool, str element, int page, Tensor page_table, "
    + _SEQUENCES.replace("Tensor(a!) out", "bool settled, Tensor(a!) out")
)
_library.define(
    "attention_prefill(Tensor query, Tensor pool, str element, int page, Tensor page_table, Tensor query_starts, "
    + _SEQUENCES
)
for _name, _function in _FUNCTIONS.items():
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"atom::{_name}", _nothing, lib=_library)
