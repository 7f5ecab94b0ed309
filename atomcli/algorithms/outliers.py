"""Order of the input channels: ascending energy, so that the channels kept in 8 bits stand last."""

import torch
from torch import Tensor

from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import Scheme


def energy_permutation(energy: Tensor) -> Tensor:
    """Channels (K,) int64 by ascending `energy` (K,), the sum of squares over the calibration tokens; ties by index."""
    return torch.argsort(energy.double(), stable=True)


def needs_order(scheme: Scheme) -> bool:
    """Whether the order of the channels matters to a scheme: not when one scale spans them all and none stands out."""
    grouped = scheme.weights.group is not None or scheme.activations.group is not None
    return grouped or scheme.outliers > 0 or scheme.transform != "none"


def input_layout(energy: Tensor, scheme: Scheme, signs: Tensor | None = None, *, natural: bool = False) -> InputLayout:
    """The layout of a layer whose input channels have `energy` (K,); its last channels are the outliers.

    `signs` (K,) int8 go before the Hadamard, where the scheme has one. `natural` leaves the channels where they are,
    which a scheme without outliers allows.
    """
    if natural and scheme.outliers:
        raise ValueError(f"the outliers of {scheme.name} stand last, which is not their natural order")
    channels = energy.shape[0]
    scheme.body(channels)  # raises when the outliers leave no body
    return InputLayout(
        channels,
        scheme.outliers,
        scheme.hadamard_block,
        permutation=energy_permutation(energy) if needs_order(scheme) and not natural else None,
        signs=signs if scheme.transform == "hadamard" else None,
        hadamard=scheme.transform == "hadamard",
    )


def fold_into_heads(permutation: Tensor, heads: int, kv_heads: int) -> Tensor | None:
    """The order of v_proj's rows that makes o_proj's input come out permuted, or None where the heads forbid it.

    permutation (heads * head_dim,) orders o_proj's input channels. Attention mixes tokens, never channels, so v's rows
    may be reordered inside a head; all query heads that share a key-value head must want the same order, and no channel
    may leave its head.
    """
    head_dim = permutation.shape[0] // heads
    order = permutation.view(heads, head_dim)
    base = torch.arange(heads, device=permutation.device)[:, None] * head_dim
    inside = order - base
    if bool((inside < 0).any()) or bool((inside >= head_dim).any()):
        return None
    shared = inside.view(kv_heads, heads // kv_heads, head_dim)
    if not bool((shared == shared[:, :1]).all()):
        return None
    rows = torch.arange(kv_heads, device=permutation.device)[:, None] * head_dim
    return (shared[:, 0] + rows).flatten()
