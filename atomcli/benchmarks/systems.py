"""What a model bench compares: models in the fused runtime, from files or with made-up weights of a published shape.

A made-up model has the shapes, schemes and kernels of a real one and is made on the device block by block, so that a
size can be timed without its weights; what it says means nothing. Its codes and scales are random like a trained
model's, which keeps the arithmetic's power, and so the clock, realistic.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import SCHEMES, KVFormat, Scheme
from atomcli.formats.weights import QuantizedWeight, tensor_layout
from atomcli.models.registry import describe
from atomcli.runtime import decoder
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.linear import QuantLinear, input_layout


@dataclass(frozen=True)
class System:
    """A model to time, by the name its rows carry, and how it is loaded."""

    name: str
    load: Callable[[], FusedModel]


def made_up(
    config: PreTrainedConfig, scheme: Scheme | None, kv: KVFormat, device: torch.device, context: int | None = None
) -> FusedModel:
    """A model of `config` with random weights: linears of its blocks in `scheme`, or in bfloat16 where that is None."""
    config = copy.deepcopy(config)
    config.dtype = torch.bfloat16
    outer: Any = decoder.empty_model(describe(config), config)
    outer.model.embed_tokens.weight = _fixed(_normal(outer.model.embed_tokens.weight.shape, device))
    outer.lm_head.weight = _fixed(_normal(outer.lm_head.weight.shape, device))
    outer.model.norm.weight = _fixed(torch.ones(config.hidden_size, dtype=torch.bfloat16, device=device))
    outer.model.rotary_emb.to(device)
    return FusedModel(outer, _blocks(config, scheme, kv, device), context)


# What is compared for a shape: the parent, what most would serve instead, and the product.
FORMATS: dict[str, tuple[Scheme | None, KVFormat]] = {
    "bf16": (None, KVFormat("float")),
    "W8A8": (SCHEMES["w8a8"], KVFormat("int8")),
    "atom w4a8": (SCHEMES["w4a8"], KVFormat("int4", hadamard=True)),
}


def _blocks(config: PreTrainedConfig, scheme: Scheme | None, kv: KVFormat, device: torch.device) -> Iterator[nn.Module]:
    family = describe(config)
    for index in range(config.num_hidden_layers):
        block = decoder.empty_block(family, config, index, kv)
        for site in family.sites(config, index) if scheme is not None else ():
            assert scheme is not None
            experts = range(family.expert_count(config, index)) if site.expert else (0,)
            names = [linear for expert in experts for linear in site.of_expert(expert)]
            layout = _layout(scheme, int(block.get_submodule(names[0]).in_features), device)  # type: ignore[arg-type]
            for name in names:
                empty: Any = block.get_submodule(name)
                weight = random_weight(scheme, empty.out_features, empty.in_features, device)
                bias = None if empty.bias is None else torch.zeros_like(empty.bias, device=device)
                decoder.quantize_linear(block, name, QuantLinear.from_weight(weight, layout, bias))
        for name, parameter in list(block.named_parameters()):
            parent, _, kind = name.rpartition(".")
            one_per_channel = parameter.dim() == 1
            made = torch.ones(parameter.shape, device=device) if one_per_channel else _normal(parameter.shape, device)
            setattr(block.get_submodule(parent), kind, _fixed(made.to(torch.bfloat16)))
        yield block


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _layout(scheme: Scheme, channels: int, device: torch.device) -> InputLayout:
    """A random permutation where there are outliers to be put last, random signs under a Hadamard."""
    permutation = torch.randperm(channels, device=device) if scheme.outliers else None
    signs = None
    if scheme.transform == "hadamard":
        signs = (torch.randint(0, 2, (channels,), device=device) * 2 - 1).to(torch.int8)
    return input_layout(scheme, channels, permutation, signs)


def random_weight(scheme: Scheme, rows: int, columns: int, device: torch.device) -> QuantizedWeight:
    """A weight with normal codes, scaled so that outputs are as large as inputs."""
    deviation = {4: 2.7, 8: 34.0}
    bits = scheme.weights.grid.bits
    fields: dict[str, Tensor] = {}
    for spec in tensor_layout(scheme, rows, columns):
        if spec.field == "codes" and bits == 4:
            low, high = (_codes(spec.shape, deviation[4], 8, device).to(torch.uint8) & 15 for _ in range(2))
            fields[spec.field] = low | high << 4
        elif spec.field == "group_scales" and not spec.dtype.is_floating_point:
            low_code, high_code = (7, 16) if spec.dtype == torch.int8 else (118, 122)
            fields[spec.field] = torch.randint(low_code, high_code, spec.shape, device=device).to(spec.dtype)
        elif spec.dtype == torch.int8:
            fields[spec.field] = _codes(spec.shape, deviation[8], 128, device)
        else:
            unit = 1 / (deviation[8 if spec.field == "outlier_scale" else bits] * columns**0.5)
            if spec.field == "unit" and scheme.weights.scale == "two_level":
                unit /= 11  # the multipliers' mean
            fields[spec.field] = torch.full(spec.shape, unit, device=device).to(spec.dtype)
    return QuantizedWeight(scheme, (rows, columns), **fields)


def _codes(shape: tuple[int, ...], deviation: float, bound: int, device: torch.device) -> Tensor:
    return (torch.randn(shape, device=device) * deviation).round_().clamp_(1 - bound, bound - 1).to(torch.int8)


def _normal(shape: torch.Size, device: torch.device) -> Tensor:
    """Weights that keep the size of what they multiply."""
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * shape[-1] ** -0.5
