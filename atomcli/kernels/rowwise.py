"""Rows between two products that stay in 16 bits: residual add and RMSNorm in one kernel, SiLU(gate) * up in another.

On a GPU the kernels of cuda/rowwise.cu where their alignment holds, elsewhere the same in torch, as transformers'
modules compute it. Layers with a low-bit input have these steps inside their quantization (kernels/quantize.py).
"""

import torch
from torch import Tensor

SOURCE = "rowwise.cu"
INPUTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
MAX_THREADS = 1024
CHUNK = 8  # numbers that a thread reads at once, 16 bytes


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (T, K), or of x + residual: the normed rows and the sum (x itself without a residual)."""
    if not _served(x, residual, weight):
        total = x if residual is None else x + residual
        return rms_norm(total, weight, epsilon), total
    normed, total = torch.ops.atom.add_norm(x, residual, weight, epsilon)
    return normed, (x if residual is None else total)


def head_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of every head of x (T, heads, head_dim); its rows may be part of wider ones."""
    if x.stride(1) != x.shape[2] or not _served(x, None, weight):
        return rms_norm(x, weight, epsilon)
    normed: Tensor = torch.ops.atom.add_norm(x, None, weight, epsilon)[0]
    return normed


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (T, K); they may be the two halves of one tensor's rows."""
    if gate.stride() != up.stride() or not _served(gate, None, up):
        return torch.nn.functional.silu(gate) * up
    product: Tensor = torch.ops.atom.silu_mul(gate, up)
    return product


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, rounded to x's dtype before the weight, as transformers does it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def _served(x: Tensor, residual: Tensor | None, weight: Tensor) -> bool:
    tensors = [t for t in (x, residual, weight) if t is not None]
    return (
        x.is_cuda
        and x.dtype in INPUTS
        and x.shape[-1] % CHUNK == 0
        and all(t.dtype == x.dtype and t.stride(-1) == 1 and t.data_ptr() % 16 == 0 for t in tensors)
        and x.stride(0) % CHUNK == 0
        and (residual is None or (residual.is_contiguous() and x.is_contiguous()))
    )


@torch.library.custom_op("atom::add_norm", mutates_args=(), device_types="cuda")
def _add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    from atomcli.kernels.compiler import load_kernel

    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    channels, parts = x.shape[-1], 1 if x.dim() == 2 else x.shape[1]
    threads = min(MAX_THREADS, -(-(channels // CHUNK) // 32) * 32)
    if x.numel():
        chunks = -(-(channels // CHUNK) // threads)
        defines: dict[str, int | str] = {
            "INPUT": INPUTS[x.dtype],
            "CHUNKS": chunks,
            "RESIDUAL": int(residual is not None),
        }
        load_kernel(SOURCE, "add_norm", x.device, defines).launch(
            x.shape[0] * parts, threads, x, residual, weight, total, normed, channels, parts, x.stride(0), epsilon,
            overlap=True,
        )  # fmt: skip
    return normed, total


@_add_norm.register_fake
def _add_norm_fake(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else (0,))


@torch.library.custom_op("atom::silu_mul", mutates_args=(), device_types="cuda")
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    from atomcli.kernels.compiler import load_kernel

    rows, channels = gate.shape
    product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if product.numel():
        threads = 256
        defines: dict[str, int | str] = {"INPUT": INPUTS[gate.dtype], "CHUNKS": 1, "RESIDUAL": 0}
        load_kernel(SOURCE, "silu_mul", gate.device, defines).launch(
            -(-rows * (channels // CHUNK) // threads), threads, gate, up, product, channels, gate.stride(0), rows,
            overlap=True,
        )  # fmt: skip
    return product


@_silu_mul.register_fake
def _silu_mul_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)
