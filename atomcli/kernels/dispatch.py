"""Which kernel serves which scheme on which card, decided in one place, with the reason where none does."""

from dataclasses import dataclass

import torch

from atomcli.errors import AtomError
from atomcli.formats.scheme import SCHEMES, Scheme
from atomcli.kernels import compiler, quantize
from atomcli.kernels.layouts import BLOCK


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a linear layer, or the reason why the reference does."""

    kernel: str | None
    reason: str | None


def choose(scheme: Scheme, device: torch.device | str, in_features: int = 4096) -> Choice:
    """What runs a linear layer of `in_features` channels in `scheme` on `device`."""
    device = torch.device(device)
    reason = gemm_reason(scheme, device) or quantize.why_not(scheme, in_features)
    if reason is None and scheme.body(in_features) < 1:
        reason = "the layer has outlier channels only"
    if reason:
        return Choice(None, reason)
    return Choice(f"gemm_w{scheme.weights.grid.bits}_sm90a", None)


def gemm_reason(scheme: Scheme, device: torch.device) -> str | None:
    """Why no GEMM kernel takes `scheme` on `device`, or None."""
    weights, activations = scheme.weights, scheme.activations
    machine = machine_reason(device)
    if machine:
        return machine
    if weights.element == "float" or activations.element == "float":
        return "weights or activations stay in 16 bits"
    if weights.element == "int4" and (weights.scale, weights.group) not in (("two_level", BLOCK), ("row", None)):
        return f"the integer GEMM needs two-level weight scales of {BLOCK} channels or row scales"
    if weights.element == "int8" and weights.scale != "row":
        return "the integer GEMM needs row scales for INT8 weights"
    if weights.element not in ("int4", "int8") or activations.element not in ("int4", "int8"):
        return "the integer GEMM takes INT4 and INT8 only"
    if activations.scale not in ("two_level", "row"):
        return "the integer GEMM needs two-level or per-token activation scales"
    if scheme.outliers > BLOCK:
        return f"the integer GEMM takes at most {BLOCK} outlier channels"
    return None


def machine_reason(device: torch.device) -> str | None:
    """Why no kernel runs on `device` at all, or None: no GPU, a card that none is built for, no compiler."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "no CUDA device: the reference runs"
    arch = compiler.architecture(device)
    if arch != "90a":
        return f"{torch.cuda.get_device_name(device)} is sm_{arch}; the integer GEMM is built for sm_90a"
    try:
        compiler.require_compiler()
    except AtomError as error:
        return error.what
    return None


def table(device: torch.device | str) -> dict[str, Choice]:
    """Every named scheme and what runs it on `device`; `atom doctor` prints it."""
    return {name: choose(scheme, device) for name, scheme in SCHEMES.items()}
