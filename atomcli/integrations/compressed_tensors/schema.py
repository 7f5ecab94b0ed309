"""What compressed-tensors can say: schemes as its arguments, groups of linears, and the quantization_config."""

from collections.abc import Mapping, Sequence
from typing import Any

from atomcli.formats.scheme import ActivationFormat, Scheme, WeightFormat
from atomcli.integrations.portable import Target, fitting_group

PACKED, INTEGERS, NVFP4, MXFP4 = "pack-quantized", "int-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
# Its range rule for dynamic INT4: the largest magnitude maps to 7.5, in the middle of -8...7; 7 in atom's.
INT4_CLIP = 7 / 7.5
# Routers are linears to it, and stay in 16 bits.
ROUTERS = r"re:.*\.(mlp|block_sparse_moe)\.gate$"


def held_weights(format: WeightFormat, in_features: int) -> WeightFormat | None:
    """The weight format it has for `format`: groups that cut the channels evenly, one level of scales."""
    if format.element == "float" or format.group is None:
        return format
    if format.scale in ("e8m0", "e4m3"):
        return format if in_features % format.group == 0 else None
    if format.element == "e2m1":
        return held_weights(WeightFormat("e2m1", 16, "e4m3"), in_features)
    group = fitting_group(format.group, in_features)
    return None if group is None else WeightFormat(format.element, group, "fp16")


def held_activations(format: ActivationFormat, in_features: int) -> ActivationFormat | None:
    """The rule of activations it has for `format`: symmetric, dynamic, without a clip ratio of its own."""
    if format.element == "float":
        return format
    if format.element == "int8":
        return ActivationFormat("int8")
    if format.element == "e2m1":
        if format.scale == "fp16":
            format = ActivationFormat("e2m1", 16, "e4m3")
        return ActivationFormat("e2m1", format.group, format.scale) if in_features % (format.group or 1) == 0 else None
    if format.group is None or in_features % format.group:
        return ActivationFormat("int4", clip=INT4_CLIP)
    return ActivationFormat("int4", format.group, "fp16", clip=INT4_CLIP)


TARGET = Target("compressed-tensors", held_weights, held_activations)


def format_of(scheme: Scheme) -> str:
    """How a plain scheme's weights lie in the file."""
    if scheme.weights.scale == "e4m3":
        return NVFP4
    if scheme.weights.scale == "e8m0":
        return MXFP4
    # Engines take INT8 weights as they are beside INT8 activations, and packed when they are alone.
    whole = scheme.weights.element == "int8" and scheme.weights.group is None and scheme.activations.element == "int8"
    return INTEGERS if whole else PACKED


def arguments(scheme: Scheme) -> dict[str, Any]:
    """weights, input_activations and format of a plain scheme."""
    weights, activations = scheme.weights, scheme.activations
    return {
        "weights": _numbers(weights.element, weights.group, weights.scale, "channel") | {"dynamic": False},
        "input_activations": None if activations.element == "float" else _inputs(activations),
        "output_activations": None,
        "format": format_of(scheme),
    }


def quantization_config(schemes: Mapping[str, Scheme], kept: Sequence[str], version: str) -> dict[str, Any]:
    """The quantization_config of a model whose linears, by their names on disk, have plain schemes or are kept.

    One group for each scheme. A single one is for every linear but the kept ones, as engines expect it; several name
    theirs one by one.
    """
    linears: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        linears.setdefault(scheme, []).append(name)
    uniform = len(linears) == 1
    groups = {
        f"group_{number}": {"targets": ["Linear"] if uniform else sorted(names), **arguments(scheme)}
        for number, (scheme, names) in enumerate(linears.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*sorted({"lm_head", *kept}), ROUTERS],
        "kv_cache_scheme": None,
        "atom": {"version": version},
    }


def _numbers(element: str, group: int | None, scale: str, ungrouped: str) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "num_bits": 8 if element == "int8" else 4,
        "type": "float" if element == "e2m1" else "int",
        "symmetric": True,
        "strategy": ungrouped if group is None else "tensor_group" if scale == "e4m3" else "group",
        "group_size": group,
    }
    dtype = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}.get(scale)
    return numbers | ({} if dtype is None else {"scale_dtype": dtype, "zp_dtype": dtype})


def _inputs(activations: ActivationFormat) -> dict[str, Any]:
    numbers = _numbers(activations.element, activations.group, activations.scale, "token")
    return numbers | {"dynamic": "local" if activations.scale == "e4m3" else True}
