"""Layout: the order and rotation of a linear layer's input channels, shared by its weight and its activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.formats.groups import apply_hadamard, hadamard_sizes


@dataclass
class InputLayout:
    """Maps input channels to the order the quantized layer works in: body by ascending energy, outliers last.

    permutation (in_features,) int64: new channel i is old channel permutation[i]; None keeps the order.
    signs (in_features,) int8 of +-1, indexed by the new order; None is all +1.
    hadamard: each block of `group` body channels, and the outlier block, is multiplied by its orthonormal Hadamard.
    Applied to activations and to weight rows alike: apply(x) @ apply(W).T == x @ W.T up to fp32 rounding.
    """

    in_features: int
    outliers: int = 0
    group: int = 128
    permutation: Tensor | None = None
    signs: Tensor | None = None
    hadamard: bool = False

    def __post_init__(self) -> None:
        for name, tensor in (("permutation", self.permutation), ("signs", self.signs)):
            if tensor is not None and tensor.shape != (self.in_features,):
                raise UsageError(f"The {name} has shape {tuple(tensor.shape)}, expected ({self.in_features},).")

    @property
    def body(self) -> int:
        """Number of body channels."""
        return self.in_features - self.outliers

    @property
    def block_sizes(self) -> list[int]:
        """Hadamard block sizes over all channels, body first."""
        return hadamard_sizes(self.body, self.group) + hadamard_sizes(self.outliers, self.group)

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in_features) of any float dtype in the layout's order and basis, fp32."""
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        x = x.float()
        if self.signs is not None:
            x = x * self.signs
        return apply_hadamard(x, self.block_sizes) if self.hadamard else x

    def invert(self, x: Tensor) -> Tensor:
        """The inverse of `apply`: x (..., in_features) fp32 back in the model's own channel order."""
        if self.hadamard:
            x = apply_hadamard(x, self.block_sizes)
        if self.signs is not None:
            x = x * self.signs
        if self.permutation is not None:
            x = x.index_select(-1, torch.argsort(self.permutation))
        return x

    def to(self, device: torch.device | str) -> "InputLayout":
        """The same layout with its tensors on `device`."""
        permutation = None if self.permutation is None else self.permutation.to(device)
        signs = None if self.signs is None else self.signs.to(device)
        return InputLayout(self.in_features, self.outliers, self.group, permutation, signs, self.hadamard)
