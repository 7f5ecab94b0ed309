"""The tensors of one linear in compressed-tensors, written from a plain weight and read back into one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight
from atomcli.integrations.compressed_tensors.schema import INTEGERS, NVFP4, PACKED, format_of

# Codes are stored with the value's offset added, which in two's complement is the top bit of each flipped.
_TOP_BITS = {4: 0x88, 8: 0x80}
_RANGE = 6 * 448  # the largest E2M1 code times the largest E4M3 scale


def to_tensors(weight: QuantizedWeight, dtype: torch.dtype, input_absmax: float | None = None) -> dict[str, Tensor]:
    """The tensors by suffix of a weight in a plain scheme; `dtype` is the model's, for scales.

    input_absmax: the largest input, for NVFP4 activations, whose tensor scale is fixed beforehand.
    """
    format = format_of(weight.scheme)
    if format == INTEGERS:
        assert weight.unit is not None
        return {"weight": weight.codes, "weight_scale": weight.unit[:, None].contiguous()}
    if format == PACKED:
        bits = weight.scheme.weights.grid.bits
        stored = weight.codes.view(torch.uint8) ^ _TOP_BITS[bits]
        words = torch.nn.functional.pad(stored, (0, -stored.shape[1] % 4)).view(torch.int32)
        scale = weight.scales().to(dtype)
        return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    assert weight.group_scales is not None
    tensors = {"weight_packed": weight.codes, "weight_scale": weight.group_scales}
    if format == NVFP4:
        assert weight.unit is not None
        tensors["weight_global_scale"] = _divisor(weight.unit)
        if weight.scheme.activations.element != "float":
            assert input_absmax is not None, "NVFP4 activations need the largest input that calibration saw"
            tensors["input_global_scale"] = _divisor(torch.tensor([input_absmax / _RANGE]))
    return tensors


def from_tensors(scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight (N, K) of a plain scheme that these tensors hold."""
    format = format_of(scheme)
    scale = tensors["weight_scale"]
    if format == INTEGERS:
        return QuantizedWeight(scheme, shape, tensors["weight"], unit=scale[:, 0].float())
    if format == PACKED:
        bits = scheme.weights.grid.bits
        stored = tensors["weight_packed"].view(torch.uint8)[:, : -(-shape[1] * bits // 8)] ^ _TOP_BITS[bits]
        codes = stored.contiguous() if bits == 4 else stored.contiguous().view(torch.int8)
        if scheme.weights.group is None:
            return QuantizedWeight(scheme, shape, codes, unit=scale[:, 0].float())
        return QuantizedWeight(scheme, shape, codes, scale)
    unit = _divisor(tensors["weight_global_scale"]) if format == NVFP4 else None
    return QuantizedWeight(scheme, shape, tensors["weight_packed"], scale, unit)


def _divisor(scale: Tensor) -> Tensor:
    """1 / scale, which is how tensor scales are stored; 1 for a tensor of zeros."""
    return torch.where(scale > 0, 1 / scale, 1.0)
