"""Stage 4, packing: a quantized block as the tensors of its shard and as the rows of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from atomcli.formats.scheme import KVFormat, Scheme
from atomcli.models.tensors import block_name
from atomcli.pipeline.model import full_name
from atomcli.pipeline.parameters import Outcome
from atomcli.runtime.linear import QuantLinear
from atomcli.runtime.saved import VERSION


def block_tensors(block: nn.Module, index: int) -> dict[str, Tensor]:
    """Every tensor of a block by its name in the checkpoint: quantized linears, norms, router, what a rule kept."""
    return {f"{block_name(index)}.{name}": tensor for name, tensor in block.state_dict().items()}


def linear_entries(block: nn.Module, index: int, names: Mapping[Scheme, str]) -> dict[str, dict[str, Any]]:
    """The entries of quantization_config["linears"] of a block; `names` are the plan's names of its schemes."""
    return {
        full_name(index, name): module.entry(names[module.scheme])
        for name, module in block.named_modules()
        if isinstance(module, QuantLinear)
    }


def report_rows(
    block: nn.Module,
    index: int,
    outcomes: Iterable[Outcome],
    names: Mapping[Scheme, str],
    ranges: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row per quantized linear: scheme, parameters, bytes of all its tensors, bits per weight, error, tokens.

    `ranges` has the largest input that calibration saw, by the linear's name in the block.
    """
    rows = []
    for outcome in outcomes:
        linear = block.get_submodule(outcome.linear)
        assert isinstance(linear, QuantLinear)
        parameters = linear.in_features * linear.out_features
        stored = sum(tensor.nbytes for tensor in linear.state_dict().values())
        rows.append(
            {
                "linear": full_name(index, outcome.linear),
                "scheme": names[linear.scheme],
                "parameters": parameters,
                "bytes": stored,
                "bits_per_weight": 8 * stored / parameters,
                "error": outcome.error,
                "tokens": outcome.tokens,
                **({} if outcome.forced is None else {"forced_tokens": outcome.forced}),
                "input_absmax": ranges[outcome.linear],
            }
        )
    return rows


def quantization_config(
    schemes: Mapping[Scheme, str],
    linears: Mapping[str, Mapping[str, Any]],
    kv_cache: KVFormat,
    caches: Sequence[KVFormat],
    kept: Iterable[str],
) -> dict[str, Any]:
    """The quantization_config of config.json; `caches` are those of the blocks, `kv_cache` is what most of them are."""
    others = {str(index): kv.to_dict() for index, kv in enumerate(caches) if kv != kv_cache}
    return {
        "quant_method": "atom",
        "version": VERSION,
        "schemes": {name: scheme.to_dict() for scheme, name in schemes.items()},
        "linears": {name: dict(entry) for name, entry in linears.items()},
        "kv_cache": kv_cache.to_dict(),
        **({"kv_cache_blocks": others} if others else {}),
        "kept": sorted(kept),
    }
