"""How much a scheme would cost a linear: the relative error of its output, estimated without quantizing for good.

For y = x W^T with weight error dW and input error dx the output error is, to first order and with dx independent of
dW, E‖x dW^T‖² + E‖dx W^T‖² = tr(dW H dW^T) + E‖dx W^T‖², with H = E[x^T x] (Frantar et al., ICLR 2023). Divided by
E‖x W^T‖² it is the t² of the linearity theorem (Malinovskii et al., "Pushing the Limits of Large Language Model
Quantization via the Linearity Theorem", NAACL 2025): while errors are small, the model's loss grows by a multiple of t²
in each layer, and the growths of all layers add up. The multiple is measured, once for every group of linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atomcli.algorithms.clipping import Clip
from atomcli.algorithms.rounding import round_to_nearest
from atomcli.formats.activations import quantize_activations
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import Scheme


@dataclass(frozen=True)
class Inputs:
    """What a site reads, in the model's own channel order.

    hessian (K, K): second moments over many tokens, of any scale. tokens (T, K) fp32 and their weights (T,): a few of
    them, on which the error of quantized activations is measured.
    """

    hessian: Tensor
    tokens: Tensor
    weights: Tensor


def in_layout(hessian: Tensor, layout: InputLayout) -> Tensor:
    """A Hessian (K, K) in the order and basis of a layout."""
    return layout.apply(layout.apply(hessian).t().contiguous())


def output_errors(
    weights: Sequence[Tensor], inputs: Inputs, layout: InputLayout, scheme: Scheme, clip: Clip, factor: Tensor | None
) -> list[float]:
    """The relative output error t² of each weight (N, K) of a site in a scheme.

    With `factor`, GPTQ's of the Hessian in the layout, the weight error is what GPTQ would report: the rounding error
    of column i costs its square over U_ii², because later columns absorb the rest. Without it weights are only rounded.
    """
    hessian = in_layout(inputs.hessian, layout)
    importance = hessian.diagonal()
    x = layout.apply(inputs.tokens)
    dx: Tensor | None = None
    if scheme.activations.element != "float":
        dx = quantize_activations(x, scheme).dequantize() - x
    return [
        _weight_error(layout.apply(weight), scheme, clip, hessian, importance, factor)
        + (0.0 if dx is None else _input_error(layout.apply(weight), x, dx, inputs.weights))
        for weight in weights
    ]


def _weight_error(
    weight: Tensor, scheme: Scheme, clip: Clip, hessian: Tensor, importance: Tensor, factor: Tensor | None
) -> float:
    if scheme.weights.element == "float":
        return 0.0
    difference = round_to_nearest(weight, importance, scheme, clip).dequantize() - weight
    whole = _quadratic(weight, hessian)
    if factor is None:
        return _ratio(_quadratic(difference, hessian), whole)
    # The factor belongs to the Hessian over the mean of its diagonal.
    columns = difference.square().sum(dim=0, dtype=torch.float64) / factor.diagonal().double().square()
    return _ratio(float(columns.sum() * importance.mean()), whole)


def _input_error(weight: Tensor, x: Tensor, dx: Tensor, token_weights: Tensor) -> float:
    def energy(inputs: Tensor) -> float:
        return float(((inputs @ weight.t()).square().sum(dim=1) * token_weights).sum(dtype=torch.float64))

    return _ratio(energy(dx), energy(x))


def _quadratic(matrix: Tensor, hessian: Tensor) -> float:
    return float(((matrix @ hessian) * matrix).sum(dtype=torch.float64))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


@dataclass(frozen=True)
class Sensitivity:
    """One group of linears: the divergence measured with one scheme alone in the model, and the error of each scheme.

    `reference` is the scheme that was measured, `kld` the KL divergence in nats that it alone causes; `errors` are the
    mean relative output errors t² of the group's linears by scheme. No reference: nothing in the group is quantized.
    """

    group: str
    reference: str | None
    kld: float
    errors: Mapping[str, float]

    def loss(self, scheme: str) -> float:
        """The divergence that `scheme` would cause alone: in proportion to its error."""
        if self.reference is None:
            return 0.0
        error = self.errors[self.reference]
        return self.kld * self.errors[scheme] / error if error > 0 else 0.0


@dataclass(frozen=True)
class Sensitivities:
    """All groups of a model, its caches, and two divergences that tie their sum to the whole.

    `cache_kld` is that of the quantized cache alone, `joint_kld` that of cache and all reference schemes together:
    errors that meet are not quite independent, and the ratio of the whole to the sum says by how much. `caches` has the
    divergence that the cache of each block causes alone; empty where none is quantized.
    """

    groups: tuple[Sensitivity, ...]
    cache_kld: float
    joint_kld: float
    caches: tuple[float, ...] = ()

    @property
    def interaction(self) -> float:
        """What divergences of single groups are multiplied by, so that the reference schemes add up to their whole."""
        total = self.cache_kld + sum(group.kld for group in self.groups)
        return self.joint_kld / total if total > 0 else 1.0

    @property
    def floor(self) -> float:
        """The divergence that no choice of schemes avoids: that of the cache as it was measured."""
        return self.cache_kld * self.interaction

    def cache_loss(self, index: int, share: float = 1.0) -> float:
        """The divergence of block `index`'s cache in the model as a whole, if its squared error were this share."""
        total = sum(self.caches)
        return share * self.floor * self.caches[index] / total if total > 0 else 0.0
