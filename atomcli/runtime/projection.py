"""Linears that read the same input, run as few products as their schemes allow, with what comes before them fused in.

Linears of one scheme and input layout become one product on their kernel (q, k, v; gate, up). Those that only quantize
alike share the operand. What comes before (residual add and norm, SiLU(gate) * up) is part of the quantization where a
kernel quantizes, and a kernel of its own where the input stays in 16 bits. Without kernels everything is the reference.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atomcli.formats.weights import stack_rows
from atomcli.kernels import dispatch, gemv, quantize, reference, rowwise
from atomcli.runtime.linear import QuantLinear, reads_alike

Linear = nn.Linear | QuantLinear
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: weight (K,) in the model's dtype."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> "Norm":
        """The norm of one of transformers' RMSNorm modules."""
        return cls(module.weight.detach(), float(module.variance_epsilon))

    def rows(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed rows of x (T, K), or of x + residual, and the sum."""
        return rowwise.add_norm(x, residual, self.weight, self.epsilon)

    def heads(self, x: Tensor) -> Tensor:
        """x (T, heads, head_dim) with each head normed."""
        return rowwise.head_norm(x, self.weight, self.epsilon)


class Projection:
    """y = x W^T + bias of linears that read one input; y (T, sum of their out_features), in their order.

    `biased` says for each linear whether its bias, where it has one, is added.
    """

    def __init__(self, linears: Sequence[Linear], dtype: torch.dtype, biased: Sequence[bool] | None = None) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.parameters = sum(self.sizes) * linears[0].in_features
        self._operands: list[_Operand] = []
        self._order: list[int] = []  # the linears, as their outputs come out
        for operand, members in _operands(linears, biased or [True] * len(linears), dtype):
            self._operands.append(operand)
            self._order += members

    @property
    def kernels(self) -> list[str]:
        """What runs each product: a kernel's name, "torch" in 16 bits, or "reference"."""
        return [name for operand in self._operands for name in operand.kernels]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights: what a product has to read."""
        return sum(operand.nbytes for operand in self._operands)

    def plain(self, x: Tensor) -> Tensor:
        """Of x (T, K)."""
        return self._joined([operand.plain(x) for operand in self._operands])

    def normed(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """Of the norm of x + residual, both (T, K); also that sum, the next residual."""
        first, *others = self._operands
        y, total, rows = first.normed(x, residual, norm, bool(others))
        return self._joined([y, *(operand.plain(rows) for operand in others)]), total

    def gated(self, gate_up: Tensor) -> Tensor:
        """Of silu(gate) * up, the two halves of gate_up (T, 2 K)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self._joined([operand.gated(gate, up) for operand in self._operands])

    @property
    def gates_one_token(self) -> bool:
        """Whether these are a gate and ups that `activated` serves."""
        kernels = [operand.one_token for operand in self._operands if isinstance(operand, _Quantized)]
        whole = len(self._operands) == 1 and self._order == [0, 1] and self.sizes[0] == self.sizes[1]
        return whole and kernels != [] and kernels[0] is not None and gemv.gates(sum(self.sizes))

    def activated(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """silu(gate) * up of the norm of x + residual, both (1, K), by one kernel; also that sum."""
        (operand,) = self._operands
        assert isinstance(operand, _Quantized)
        return operand.activated(x, residual, norm)

    def _joined(self, outputs: list[Tensor]) -> Tensor:
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if self._order == sorted(self._order):
            return joined
        pieces = joined.split([self.sizes[index] for index in self._order], dim=-1)
        return torch.cat([pieces[self._order.index(index)] for index in range(len(pieces))], dim=-1)


class _Operand(Protocol):
    """Linears that share the form in which they read their input; each method answers (T, sum of out_features)."""

    kernels: list[str]
    nbytes: int

    def plain(self, x: Tensor) -> Tensor: ...

    def normed(self, x: Tensor, residual: Tensor | None, norm: Norm, want: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Also the sum x + residual and, if wanted, the normed rows."""
        ...

    def gated(self, gate: Tensor, up: Tensor) -> Tensor: ...


class _Plain:
    """Linears whose inputs stay in 16 (or 32) bits: one product of torch."""

    def __init__(self, linears: Sequence[nn.Linear], biased: Sequence[bool]) -> None:
        weights = [linear.weight.detach() for linear in linears]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias = _stacked_bias(linears, biased, self.weight.dtype)
        self.kernels, self.nbytes = ["torch"], self.weight.nbytes

    def plain(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def normed(self, x: Tensor, residual: Tensor | None, norm: Norm, want: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows, total = norm.rows(x, residual)
        return self.plain(rows), total, rows

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.plain(rowwise.silu_mul(gate, up))


class _Reference:
    """Quantized linears that no kernel serves: `kernels.reference`, one linear at a time."""

    def __init__(self, linears: Sequence[QuantLinear], biased: Sequence[bool]) -> None:
        self.linears, self.biased = linears, biased
        self.kernels = ["reference"] * len(linears)
        self.nbytes = sum(map(_stored_bytes, linears))

    def plain(self, x: Tensor) -> Tensor:
        first = self.linears[0]
        rows = reference.quantized_input(x, first.scheme, first.layout)
        outputs = []
        for linear, add_bias in zip(self.linears, self.biased, strict=True):
            y = rows @ linear.dequantized().T
            outputs.append(y if linear.bias is None or not add_bias else y + linear.bias.float())
        return torch.cat(outputs, dim=-1).to(x.dtype)

    def normed(self, x: Tensor, residual: Tensor | None, norm: Norm, want: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows, total = norm.rows(x, residual)
        return self.plain(rows), total, rows

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.plain(rowwise.silu_mul(gate, up))


@dataclass
class _Product:
    """A product on its kernel, of linears under each other, and their bias fp32."""

    product: dispatch.Product
    bias: Tensor | None
    nbytes: int


class _Quantized:
    """Products that read one operand: quantized once, by the kernel that also does what comes before.

    For a single token and a single product that kernel multiplies, too.
    """

    def __init__(self, products: Sequence[_Product]) -> None:
        self.products = products
        first = products[0].product
        self.scheme, self.layout, self.container = first.scheme, first.layout, first.container
        self.kernels = [each.product.kernel for each in products]
        self.nbytes = sum(each.nbytes for each in products)
        self.one_token: Callable[..., tuple[Tensor, Tensor]] | None = None
        if len(products) == 1 and first.one_token is not None:
            self.one_token = partial(first.one_token, bias=products[0].bias)

    def plain(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self.one_token is not None:
            return self.one_token(x)[0]
        return self._multiply(quantize.quantize(x, self.scheme, self.layout, self.container), x)

    def normed(self, x: Tensor, residual: Tensor | None, norm: Norm, want: bool) -> tuple[Tensor, Tensor, Tensor]:
        if len(x) == 1 and self.one_token is not None and not want:
            before: dict[str, Any] = {"norm_weight": norm.weight, "epsilon": norm.epsilon}
            if residual is None:
                return self.one_token(x, prologue="norm", **before)[0], x, x
            y, total = self.one_token(x, prologue="add_norm", other=residual, **before)
            return y, total, x
        operand, total, rows = quantize.norm_quantize(
            x, norm.weight, norm.epsilon, self.scheme, self.layout, residual, want_normed=want, container=self.container
        )
        return self._multiply(operand, x), total, x if rows is None else rows

    def activated(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        assert self.one_token is not None
        before: dict[str, Any] = {"norm_weight": norm.weight, "epsilon": norm.epsilon}
        return self.one_token(x, prologue="add_norm", other=residual, gated=True, **before)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if len(gate) == 1 and self.one_token is not None:
            return self.one_token(gate, prologue="silu_mul", other=up)[0]
        return self._multiply(quantize.silu_mul_quantize(gate, up, self.scheme, self.layout, self.container), gate)

    def _multiply(self, operand: quantize.Operand, x: Tensor) -> Tensor:
        outputs = [each.product.multiply(operand, x.shape[0], x.dtype, each.bias) for each in self.products]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


# ------------------------------------------------------------------------------------------------ choosing


def _operands(
    linears: Sequence[Linear], biased: Sequence[bool], dtype: torch.dtype
) -> Iterator[tuple[_Operand, list[int]]]:
    """The operands that a site needs, and which linears read each."""
    plain = [index for index, linear in enumerate(linears) if isinstance(linear, nn.Linear)]
    if plain:
        floats = [linear for linear in linears if isinstance(linear, nn.Linear)]
        yield _Plain(floats, [biased[index] for index in plain]), plain
    quantized = {index: linear for index, linear in enumerate(linears) if isinstance(linear, QuantLinear)}
    slow = [index for index, linear in quantized.items() if not _has_kernel(linear, dtype)]
    for members in _classes(slow, lambda a, b: reads_alike(quantized[a], quantized[b])):
        yield _Reference([quantized[index] for index in members], [biased[index] for index in members]), members
    stacks = _classes([i for i in quantized if i not in slow], lambda a, b: _stackable(quantized[a], quantized[b]))
    products = {
        stack[0]: _product([quantized[index] for index in stack], [biased[index] for index in stack])
        for stack in stacks
    }

    def share(a: int, b: int) -> bool:
        same_container = products[a].product.container == products[b].product.container
        return same_container and reads_alike(quantized[a], quantized[b])

    for leaders in _classes(list(products), share):
        members = [index for stack in stacks if stack[0] in leaders for index in stack]
        yield _Quantized([products[leader] for leader in leaders]), members


def _classes(items: Sequence[int], alike: Callable[[int, int], bool]) -> list[list[int]]:
    """The items in classes of those that are alike, in order of first appearance."""
    classes: list[list[int]] = []
    for item in items:
        found = next((members for members in classes if alike(members[0], item)), None)
        if found is None:
            classes.append([item])
        else:
            found.append(item)
    return classes


def _has_kernel(linear: QuantLinear, dtype: torch.dtype) -> bool:
    return dtype in KERNEL_DTYPES and linear.kernel_choice().kernel is not None


def _stackable(first: QuantLinear, second: QuantLinear) -> bool:
    weights = first.scheme.weights
    return weights == second.scheme.weights and weights.scale != "e4m3" and reads_alike(first, second)


def _product(linears: Sequence[QuantLinear], biased: Sequence[bool]) -> _Product:
    stacked = stack_rows([linear.weight_tensors for linear in linears])
    stored = sum(map(_stored_bytes, linears))
    bias = _stacked_bias(linears, biased, torch.float32)
    product = dispatch.prepare(stacked, linears[0].layout)
    for linear in linears:
        linear.keep_on_host()  # the stack is the only copy on the card
    return _Product(product, bias, stored)


def _stored_bytes(linear: QuantLinear) -> int:
    return sum(tensor.nbytes for tensor in linear.weight_tensors.tensors().values())


def _stacked_bias(linears: Sequence[Linear], biased: Sequence[bool], dtype: torch.dtype) -> Tensor | None:
    """The biases that are added, zeros where none is; None where there is none at all."""
    added = [linear.bias if add else None for linear, add in zip(linears, biased, strict=True)]
    device = next((bias.device for bias in added if bias is not None), None)
    if device is None:
        return None
    parts = [
        torch.zeros(linear.out_features, dtype=dtype, device=device) if bias is None else bias.detach().to(dtype)
        for linear, bias in zip(linears, added, strict=True)
    ]
    return torch.cat(parts)
