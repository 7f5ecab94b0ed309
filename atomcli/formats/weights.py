"""Quantized weights: the tensors of one linear layer in a checkpoint, and what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atomcli.errors import InputError
from atomcli.formats import grids, packing, scales
from atomcli.formats.groups import expand, group_count
from atomcli.formats.scheme import Scheme

_GROUP_SCALES = {
    "fp16": ("weight_scale", torch.float16),
    "e4m3": ("weight_scale", torch.float8_e4m3fn),
    "e8m0": ("weight_exponent", torch.uint8),
    "two_level": ("weight_multiplier", torch.int8),
}


@dataclass
class QuantizedWeight:
    """A weight (N out_features, K in_features) in its scheme; channels stand in the layout's order, outliers last.

    codes: uint8 (N, ceil(body / 2)) packed 4-bit codes, int8 (N, body), or the unquantized weight (N, K).
    group_scales (N, G): fp16, float8_e4m3fn, E8M0 uint8 exponents, or int8 multipliers; None with row scales.
    unit: fp32 (N,) row scale (two_level, row) or (1,) tensor scale (e4m3).
    outlier_codes int8 (N, O) and outlier_scale fp32 (N,).
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    group_scales: Tensor | None = None
    unit: Tensor | None = None
    outlier_codes: Tensor | None = None
    outlier_scale: Tensor | None = None

    @property
    def body(self) -> int:
        """Number of body channels."""
        return self.scheme.body(self.shape[1])

    @classmethod
    def from_codes(
        cls,
        scheme: Scheme,
        codes: Tensor,
        group_scales: Tensor | None = None,
        unit: Tensor | None = None,
        outlier_codes: Tensor | None = None,
        outlier_scale: Tensor | None = None,
    ) -> "QuantizedWeight":
        """Pack int8 body codes (N, body) and their scales; an empty outlier block may be None."""
        rows, body = codes.shape
        packed = packing.pack_nibbles(codes) if scheme.weights.grid.bits == 4 else codes
        shape = (rows, body + scheme.outliers)
        return cls(scheme, shape, packed, group_scales, unit, outlier_codes, outlier_scale)

    def body_codes(self) -> Tensor:
        """Codes of the body, int8 (N, body): integers, or 4-bit E2M1 codes."""
        format = self.scheme.weights
        if format.grid.bits == 8:
            return self.codes
        return packing.unpack_nibbles(self.codes, self.body, signed=format.element == "int4")

    def scales(self) -> Tensor:
        """Scales the arithmetic uses, fp32 (N, G); one column for row scales."""
        return scales.effective(self.group_scales, self.scheme.weights, self.unit)

    def integers(self) -> Tensor:
        """Two-level or row-scaled body as the exact INT8 operand m * q, int8 (N, body)."""
        codes = self.body_codes()
        if self.scheme.weights.scale != "two_level":
            return codes
        assert self.group_scales is not None
        return codes * expand(self.group_scales, self.body, self.scheme.weights.group)

    def dequantize(self) -> Tensor:
        """The weight the arithmetic sees, fp32 (N, K), in the layout's channel order."""
        format = self.scheme.weights
        if format.element == "float":
            return self.codes.float()
        body = grids.decode(self.body_codes(), format.grid) * expand(self.scales(), self.body, format.group)
        if not self.scheme.outliers:
            return body
        assert self.outlier_codes is not None
        assert self.outlier_scale is not None
        return torch.cat([body, self.outlier_codes.float() * self.outlier_scale[:, None]], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint tensors by suffix."""
        layout = tensor_layout(self.scheme, *self.shape, float_dtype=self.codes.dtype)
        return {spec.suffix: getattr(self, spec.field) for spec in layout}

    @classmethod
    def from_tensors(cls, scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor]) -> "QuantizedWeight":
        """The weight whose checkpoint tensors are `tensors`; InputError names one that is missing or misshapen."""
        float_dtype = tensors["weight"].dtype if "weight" in tensors else torch.bfloat16
        fields = {}
        for spec in tensor_layout(scheme, *shape, float_dtype=float_dtype):
            tensor = tensors.get(spec.suffix)
            if tensor is None:
                raise InputError(f"The checkpoint lacks {spec.suffix}, which scheme {scheme.name} needs.")
            if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise InputError(
                    f"{spec.suffix} is {tensor.dtype} {tuple(tensor.shape)}, but scheme {scheme.name} says "
                    f"{spec.dtype} {spec.shape}."
                )
            fields[spec.field] = tensor
        return cls(scheme, shape, **fields)


def stack_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights (N_i, K) of one scheme under each other, (sum N_i, K); a scale per tensor can't be shared: e4m3 scales
    are no input."""
    first = weights[0]
    assert all(weight.scheme == first.scheme for weight in weights)
    assert first.scheme.weights.scale != "e4m3", "every weight has a tensor scale of its own"
    if len(weights) == 1:
        return first
    specs = tensor_layout(first.scheme, *first.shape, float_dtype=first.codes.dtype)
    fields = {spec.field: torch.cat([getattr(weight, spec.field) for weight in weights]) for spec in specs}
    return QuantizedWeight(first.scheme, (sum(weight.shape[0] for weight in weights), first.shape[1]), **fields)


@dataclass(frozen=True)
class TensorSpec:
    """One checkpoint tensor of a linear: its name's suffix, shape and dtype, and the QuantizedWeight field it fills."""

    field: str
    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def tensor_layout(
    scheme: Scheme, out_features: int, in_features: int, float_dtype: torch.dtype = torch.bfloat16
) -> list[TensorSpec]:
    """The checkpoint tensors of a weight (out_features, in_features) in `scheme`."""
    format, rows, body = scheme.weights, out_features, scheme.body(in_features)
    if format.element == "float":
        return [TensorSpec("codes", "weight", (rows, in_features), float_dtype)]
    if format.grid.bits == 4:
        layout = [TensorSpec("codes", "weight_packed", (rows, -(-body // 2)), torch.uint8)]
    else:
        layout = [TensorSpec("codes", "weight_codes", (rows, body), torch.int8)]
    if format.scale in _GROUP_SCALES:
        suffix, dtype = _GROUP_SCALES[format.scale]
        layout.append(TensorSpec("group_scales", suffix, (rows, group_count(body, format.group)), dtype))
    if format.scale in ("two_level", "row"):
        layout.append(TensorSpec("unit", "weight_row_scale", (rows,), torch.float32))
    if format.scale == "e4m3":
        layout.append(TensorSpec("unit", "weight_tensor_scale", (1,), torch.float32))
    if scheme.outliers:
        layout.append(TensorSpec("outlier_codes", "outlier_weight", (rows, scheme.outliers), torch.int8))
        layout.append(TensorSpec("outlier_scale", "outlier_scale", (rows,), torch.float32))
    return layout
