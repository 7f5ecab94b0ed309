"""The oracle: every kernel's contract in plain torch, on any device.

`linear` is also what runs where no kernel does. Its product is taken over dequantized operands in fp32; the kernels
sum integers and scale the sums. The two agree up to fp32 re-association; `integer_sums` and `linear_from_integers`
state the kernels' own arithmetic, whose integer sums must be equal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from atomcli.formats.activations import QuantizedActivations, quantize_activations
from atomcli.formats.groups import split
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight


def quantized_input(x: Tensor, scheme: Scheme, layout: InputLayout) -> Tensor:
    """The input the arithmetic sees: x (T, K) in the layout's order, quantized and dequantized, fp32 (T, K)."""
    x = layout.apply(x)
    return x if scheme.activations.element == "float" else quantize_activations(x, scheme).dequantize()


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    layout: InputLayout,
    bias: Tensor | None = None,
    dequantized: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias with both operands in their scheme; x (..., K), y (..., N) in x's dtype.

    `dequantized` is weight.dequantize() where the caller keeps it.
    """
    tokens = quantized_input(x.reshape(-1, x.shape[-1]), weight.scheme, layout)
    y = tokens @ (weight.dequantize() if dequantized is None else dequantized).T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@dataclass
class IntegerSums:
    """What an integer kernel accumulates: body sums int64 (T, N, G), one group when no scale differs inside a row,
    and outlier sums int64 (T, N) or None."""

    body: Tensor
    outliers: Tensor | None


def integer_sums(activations: QuantizedActivations, weight: QuantizedWeight) -> IntegerSums:
    """Exact partial sums of a layer with integer grids: per group under fp16 group scales, else over the whole body."""
    x, w = activations.integers(), weight.integers()
    group = weight.scheme.weights.group if _is_per_group(weight.scheme) else None
    body = torch.einsum("tgk,ngk->tng", split(x.double(), group), split(w.double(), group)).long()
    if activations.outlier_codes is None or weight.outlier_codes is None:
        return IntegerSums(body, None)
    return IntegerSums(body, (activations.outlier_codes.double() @ weight.outlier_codes.double().T).long())


def linear_from_integers(
    sums: IntegerSums, activations: QuantizedActivations, weight: QuantizedWeight, bias: Tensor | None = None
) -> Tensor:
    """y (T, N) fp32 from the integer sums: scales are applied to sums, never to elements."""
    if _is_per_group(weight.scheme):
        y = torch.einsum("tng,tg,ng->tn", sums.body.float(), activations.scales(), weight.scales())
    else:
        assert activations.token_scale is not None
        assert weight.unit is not None
        y = sums.body[..., 0].float() * activations.token_scale[:, None] * weight.unit
    if sums.outliers is not None:
        assert activations.outlier_scale is not None
        assert weight.outlier_scale is not None
        y = y + sums.outliers.float() * activations.outlier_scale[:, None] * weight.outlier_scale
    return y if bias is None else y + bias.float()


def _is_per_group(scheme: Scheme) -> bool:
    return scheme.weights.scale == "fp16"
