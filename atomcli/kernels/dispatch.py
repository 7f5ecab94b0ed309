"""Which kernel serves which scheme on which card, decided in one place, with the reason where none does.

`choose` answers for a scheme, `prepare` builds the product of one layer: its weight repacked for the kernel that was
chosen, and how its input is to be quantized.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from atomcli.errors import AtomError, UnsupportedError
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import SCHEMES, Scheme
from atomcli.formats.weights import QuantizedWeight
from atomcli.kernels import compiler, gemm, gemv, group_gemm, layouts, quantize, warp_gemm, weight_gemm, weight_layouts
from atomcli.kernels.group_layouts import pack_groups
from atomcli.kernels.quantize_launch import Container

ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a linear layer, or the reason why the reference does."""

    kernel: str | None
    reason: str | None


def choose(scheme: Scheme, device: torch.device | str, in_features: int = 4096) -> Choice:
    """What runs a linear layer of `in_features` channels in `scheme` on `device`."""
    return _choose(scheme, torch.device(device), in_features)


@cache
def _choose(scheme: Scheme, device: torch.device, in_features: int) -> Choice:
    reason = machine_reason(device) or quantize.why_not(scheme, in_features)
    if reason is None and scheme.body(in_features) < 1:
        reason = "the layer has outlier channels only"
    return Choice(None, reason) if reason else choose_for(scheme, compiler.architecture(device))


def choose_for(scheme: Scheme, arch: str) -> Choice:
    """The GEMM for `scheme` on `arch`: on integers where all scales lie outside the sums, else with group scales."""
    if arch not in ARCHITECTURES:
        return Choice(None, f"the kernels are built for sm_{', '.join(ARCHITECTURES)}, not for sm_{arch}")
    if scheme.weights.element == "float":
        return Choice(None, "weights stay in 16 bits")
    if scheme.activations.element == "float":
        reason = weight_gemm.why_not(scheme, arch)
        return Choice(None, reason) if reason else Choice("gemm_w4a16_sm90a", None)
    integer_reason = layouts.scheme_reason(scheme)
    if integer_reason is None:
        bits = scheme.weights.grid.bits
        return Choice(f"gemm_w{bits}_sm90a" if arch == "90a" else "gemm_w4_sm80", None)
    group_reason = group_gemm.why_not(scheme, arch)
    if group_reason is None and arch == "90a" and not scheme.outliers:
        if scheme.weights.scale == "e8m0":
            return Choice("gemm_mxfp4_sm90a", None)
        if scheme.weights.scale == "e4m3":  # codes times scales are fp16 numbers, on both sides
            return Choice("gemm_w4a16_sm90a", None)
    if group_reason is None:
        return Choice(
            "gemm_groups_sm90a" if arch == "90a" else group_gemm.nibble_kernel(scheme)[0].removesuffix(".cu"), None
        )
    float_scales = scheme.weights.scale in group_gemm.WEIGHT_SCALES
    return Choice(None, group_reason if float_scales else integer_reason)


def choose_for_experts(scheme: Scheme, device: torch.device | str, in_features: int = 4096) -> Choice:
    """What runs all experts of a mixture as one product, or why each expert runs on its own."""
    choice = choose(scheme, device, in_features)
    if choice.kernel == "gemm_w4a16_sm90a" and scheme.weights.scale == "e4m3":
        return Choice(None, "experts with a scale per tensor are not one product")
    if choice.kernel is None or choice.kernel in ("gemm_w4_sm90a", "gemm_w8_sm90a", "gemm_w4a16_sm90a"):
        return choice
    return Choice(None, f"experts are one product on the integer GEMM of sm_90a, not on {choice.kernel}")


def machine_reason(device: torch.device) -> str | None:
    """Why no kernel runs on `device` at all, or None: no GPU, a card that none is built for, no compiler."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "no CUDA device: the reference runs"
    arch = compiler.architecture(device)
    if arch not in ARCHITECTURES:
        name = torch.cuda.get_device_name(device)
        return f"{name} is sm_{arch}; the kernels are built for sm_{', '.join(ARCHITECTURES)}"
    try:
        compiler.require_compiler()
    except AtomError as error:
        return error.what
    return None


def table(device: torch.device | str) -> dict[str, Choice]:
    """Every named scheme and what runs it on `device`; `atom doctor` prints it."""
    return {name: choose(scheme, device) for name, scheme in SCHEMES.items()}


@dataclass(frozen=True)
class Product:
    """y = x W^T of one layer on its kernel. Layers that read the same input alike may share its operand.

    `one_token`, where there is one, is the kernel that does all of it for a single token: `gemv.linear` of this layer.
    """

    kernel: str
    scheme: Scheme
    layout: quantize.KernelLayout
    container: Container
    multiply: Callable[[quantize.Operand, int, torch.dtype, Tensor | None], Tensor]
    one_token: Callable[..., tuple[Tensor, Tensor]] | None = None

    def quantize(self, x: Tensor) -> quantize.Operand:
        """The operand of x (tokens, in_features) fp32, fp16 or bf16."""
        return quantize.quantize(x, self.scheme, self.layout, self.container)


@dataclass(frozen=True)
class ExpertProduct:
    """y = x W^T of a layer of all experts, for inputs that are sorted by the expert that each of them takes."""

    scheme: Scheme
    layout: quantize.KernelLayout
    container: Container
    weights: layouts.GemmWeight | weight_layouts.ScaledWeight

    def multiply(self, operand: quantize.Operand, expert_starts: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        """y (tokens, out_features); expert_starts (experts + 1,) int32 says where each expert's tokens begin."""
        if isinstance(self.weights, weight_layouts.ScaledWeight):
            return weight_gemm.expert_linear(operand, self.weights, expert_starts, tokens, dtype)
        return gemm.expert_linear(operand, self.weights, expert_starts, tokens, dtype)


def prepare_experts(weights: Sequence[QuantizedWeight], layout: InputLayout) -> ExpertProduct:
    """The product of experts that share scheme, shape and layout; UnsupportedError says why there is none."""
    first = weights[0]
    choice = choose_for_experts(first.scheme, first.codes.device, first.shape[1])
    if choice.kernel is None:
        raise UnsupportedError(f"No kernel serves experts in scheme {first.scheme.name}: {choice.reason}.")
    kernel_layout = quantize.prepare_layout(layout, first.codes.device)
    if choice.kernel == "gemm_w4a16_sm90a":
        scaled = weight_layouts.stack([weight_layouts.prepare(weight) for weight in weights])
        return ExpertProduct(first.scheme, kernel_layout, "f16", scaled)
    stacked = layouts.stack([layouts.prepare_weight(weight) for weight in weights])
    return ExpertProduct(first.scheme, kernel_layout, "s8", stacked)


def prepare(weight: QuantizedWeight, layout: InputLayout) -> Product:
    """The product of a weight on the device it lies on; UnsupportedError says why there is none."""
    device, scheme = weight.codes.device, weight.scheme
    choice = choose(scheme, device, weight.shape[1])
    if choice.kernel is None:
        raise UnsupportedError(f"No kernel serves scheme {scheme.name} on {device}: {choice.reason}.")
    kernel_layout = quantize.prepare_layout(layout, device)
    if choice.kernel == "gemm_w4a16_sm90a":
        multiply = _with_weight(weight_gemm.linear, weight_layouts.prepare(weight))
        return Product(choice.kernel, scheme, kernel_layout, "f16", multiply)
    if layouts.scheme_reason(scheme) is None:
        packed = layouts.prepare_weight(weight)
        if not choice.kernel.endswith("sm90a"):
            return Product(choice.kernel, scheme, kernel_layout, "s8", _with_weight(warp_gemm.linear, packed))
        multiply, one_token = _with_weight(gemm.linear, packed), None
        if gemv.why_not(packed, compiler.multiprocessors(device)) is None:
            one_token = partial(gemv.linear, weight=packed, scheme=scheme, layout=kernel_layout)
        return Product(choice.kernel, scheme, kernel_layout, "s8", multiply, one_token)
    if choice.kernel == "gemm_mxfp4_sm90a":
        scaled = layouts.prepare_mxfp4(weight)
        if scaled is not None:
            return Product(choice.kernel, scheme, kernel_layout, "e4m3_scaled", _with_weight(gemm.linear, scaled))
        choice = Choice("gemm_groups_sm90a", None)  # a row's scales lie too far apart
    assert choice.kernel is not None
    codes = group_gemm.codes_for(compiler.architecture(device))
    groups = pack_groups(weight, codes)
    container: Container = "e4m3" if codes == "e4m3" else "nibble"
    return Product(choice.kernel, scheme, kernel_layout, container, _with_weight(partial(_groups, scheme), groups))


def _with_weight(linear, weight):  # type: ignore[no-untyped-def]
    return lambda operand, tokens, dtype, bias: linear(operand, weight, tokens, dtype, bias)


def _groups(scheme: Scheme, operand, weight, tokens, dtype, bias):  # type: ignore[no-untyped-def]
    return group_gemm.linear(operand, weight, scheme, tokens, dtype, bias)
