"""Linears in vLLM: each projection of a merged layer keeps its scheme, layout and tensors, whole or its rank's part.

vLLM fuses q, k, v and gate, up into one layer; an atom checkpoint stores each with a scheme of its own. So a layer
holds one module per projection until its tensors are there, and then a `Projection`, which runs them in as few products
as their schemes allow. All that torch.compile sees is one operator, `atom::served_linear`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import set_weight_attrs

from atomcli.errors import InputError, UnsupportedError
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import tensor_layout
from atomcli.integrations.vllm import operators
from atomcli.integrations.vllm.dummy import fill
from atomcli.integrations.vllm.sharding import Part, column_part, slice_operand, split_rows, tensor_part
from atomcli.kernels import dispatch, quantize, reference, tune
from atomcli.runtime.linear import QuantLinear, input_layout, permutation_dtype
from atomcli.runtime.projection import Projection

SHARD_IDS: Mapping[Any, int] = {None: 0, "q": 0, "k": 1, "v": 2}
WHOLE = "whole_"  # prefix of the permutation and signs of a whole input, beside a part of the weight


@dataclass
class Shard:
    """One projection of a layer on this rank: its name in the checkpoint, and the module its tensors are loaded into.

    `scheme` is the whole linear's, None where it stayed in 16 bits; `gathered`: every rank quantizes the whole input.
    """

    name: str
    scheme: Scheme | None
    in_features: int
    part: Part
    module: QuantLinear | nn.Linear
    gathered: bool = False
    loaded: set[str] = field(default_factory=set)

    def load(self, suffix: str, tensor: Tensor) -> None:
        """Take this rank's part of a checkpoint tensor; InputError when it isn't what config.json says."""
        if suffix.startswith("outlier_") and not self.part.outliers:
            return
        if self.scheme is None:
            share = tensor[self.part.rows[0] : self.part.rows[1], self.part.body[0] : self.part.body[1]]
        else:
            share = tensor_part(suffix, tensor, self.scheme, self.in_features, self.part)
            if suffix == "signs" and not self.gathered:
                share = tensor[self.part.channels(self.scheme, self.in_features).to(tensor.device)]
        target = self.tensors().get(suffix)
        if target is None or target.shape != share.shape or (self.scheme is not None and target.dtype != share.dtype):
            raise InputError(
                f"Tensor {self.name}.{suffix} is {tensor.dtype} {list(tensor.shape)}, which config.json contradicts",
                "config.json and the tensors belong to different checkpoints",
            )
        target.copy_(share)
        self.loaded.add(suffix)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be loaded, by suffix; vLLM loads a layer's bias itself."""
        tensors = {name: tensor for name, tensor in self.module.state_dict().items() if name != "bias"}
        return {name.removeprefix(WHOLE): tensor for name, tensor in tensors.items()}

    def stored(self) -> dict[str, torch.dtype]:
        """The tensors of the linear in the checkpoint, those included of which this rank holds nothing."""
        own = {name: tensor.dtype for name, tensor in self.tensors().items()}
        if self.scheme is None:
            return own
        return own | {spec.suffix: spec.dtype for spec in tensor_layout(self.scheme, 1, self.in_features)}


class AtomLinearMethod(LinearMethodBase):
    """The linears of an atom checkpoint; `names` are those of the layer's projections in the checkpoint."""

    def __init__(self, config: Any, names: Sequence[str]) -> None:
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make room for this rank's part of every projection."""
        device = torch.get_default_device()
        rows = row_bounds(layer, output_partition_sizes)
        shards = []
        for name, bounds in zip(self.names, rows, strict=True):
            scheme = self.config.scheme(name)
            if isinstance(layer, RowParallelLinear):
                entry = self.config.plan.linears[name]
                shards.append(row_shard(name, scheme, entry, layer, params_dtype, device))
            else:
                shards.append(self._column_shard(name, scheme, input_size, bounds, params_dtype, device))
        layer.atom_shards = shards
        # A slot per kind of tensor lets vLLM's loader find a parameter of that name; the tensors lie in the shards.
        for suffix, dtype in {suffix: dtype for shard in shards for suffix, dtype in shard.stored().items()}.items():
            slot = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(slot, {"weight_loader": partial(_load, shards, suffix)})
            layer.register_parameter(suffix, slot)
        layer.register_buffer("atom_handle", operators.handle(), persistent=False)
        layer.atom_in_features, layer.atom_out_features = input_size_per_partition, sum(output_partition_sizes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack what was loaded for the kernels, and forget the rest."""
        shards: list[Shard] = layer.atom_shards
        for shard in shards:
            if self.config.dummy:
                fill(shard.tensors())
                shard.loaded |= shard.tensors().keys()
            missing = sorted(shard.tensors().keys() - shard.loaded)
            if missing:
                raise InputError(f"The checkpoint lacks {shard.name}.{missing[0]}", "The checkpoint is incomplete")
            if isinstance(shard.module, QuantLinear) and shard.module.kernel_choice().kernel is None:
                size = 4 * shard.module.in_features * shard.module.out_features
                shard.module.keep_dequantized = self.config.has_room(size)
        biased = self._take_bias(layer, shards)
        if shards[0].gathered:
            run: Callable[[Tensor], Tensor] = GatheredLinear(shards[0])
        else:
            run = Projection([shard.module for shard in shards], self.config.dtype, biased).plain
        del layer.atom_shards
        operators.serve(layer.atom_handle, run)
        if layer.atom_handle.is_cuda:
            self._load_kernels(run, layer)

    def _load_kernels(self, run: Callable[[Tensor], Tensor], layer: Any) -> None:
        """Compile and load what this shape of layer may ever launch: a request must not wait for a compiler."""
        columns, most = layer.atom_in_features, self.config.most_tokens
        key = (columns, layer.atom_out_features, *map(self.config.scheme, self.names))
        if key in self.config.loaded_shapes:
            return
        self.config.loaded_shapes.add(key)
        for tokens in {1, *(min(bucket, most) for bucket in tune.BUCKETS)}:
            run(torch.zeros(tokens, columns, dtype=self.config.dtype, device=layer.atom_handle.device))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in_features of the rank) -> (..., out_features of the rank)."""
        y: Tensor = torch.ops.atom.served_linear(x, layer.atom_handle, layer.atom_out_features)
        return y

    def _column_shard(
        self,
        name: str,
        scheme: Scheme | None,
        in_features: int,
        rows: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Shard:
        count = rows[1] - rows[0]
        if scheme is None:
            linear = nn.Linear(in_features, count, bias=False, dtype=dtype, device=device).requires_grad_(False)
            return Shard(name, None, in_features, Part(rows, (0, in_features), True), linear)
        entry = self.config.plan.linears[name]
        part = column_part(scheme, in_features, rows)
        module = _module(part, scheme, in_features, entry, dtype, device)
        return Shard(name, scheme, in_features, part, module)

    def _take_bias(self, layer: Any, shards: Sequence[Shard]) -> list[bool]:
        """Give the projections their rows of the layer's bias; those that the cache holds apart go to the attention."""
        biased = [True] * len(shards)
        if layer.bias is None or layer.skip_bias_add or (isinstance(layer, RowParallelLinear) and layer.tp_rank > 0):
            return biased
        pieces = layer.bias.data.split([shard.module.out_features for shard in shards])
        for shard, piece in zip(shards, pieces, strict=True):
            shard.module.bias = nn.Parameter(piece, False) if isinstance(shard.module, nn.Linear) else piece
        if isinstance(layer, QKVParallelLinear) and self.config.keeps_bias_apart:
            attention = layer.prefix.removesuffix("qkv_proj") + "attn"
            self.config.cache_biases[attention] = (pieces[1], pieces[2])
            biased[1:] = [False, False]
        return biased


class GatheredLinear:
    """A row-parallel linear whose codes depend on the whole input: each rank quantizes all of it, multiplies its part.

    The codes are those that one rank would compute, bit for bit.
    """

    def __init__(self, shard: Shard) -> None:
        assert isinstance(shard.module, QuantLinear)
        assert shard.scheme is not None
        self.linear, self.scheme, self.part = shard.module, shard.scheme, shard.part
        self.channels = shard.part.channels(shard.scheme, shard.in_features).to(shard.module.device)
        layout = {name: getattr(shard.module, WHOLE + name) for name in ("permutation", "signs")}
        self.layout = input_layout(shard.scheme, shard.in_features, **layout)
        self.product: dispatch.Product | None = None
        self.bias = None if self.linear.bias is None else self.linear.bias.float()
        if self.linear.kernel_choice().kernel is not None:
            own = input_layout(self.linear.scheme, self.linear.in_features)
            product = dispatch.prepare(self.linear.weight_tensors, own)
            whole = quantize.prepare_layout(self.layout, self.linear.device)
            self.product = replace(product, scheme=self.scheme, layout=whole)
            del self.linear

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, channels of this rank) -> this rank's addend of y (T, out_features)."""
        x = tensor_model_parallel_all_gather(x, dim=-1)
        if self.product is not None:
            operand = slice_operand(self.product.quantize(x), self.product.layout, self.part)
            return self.product.multiply(operand, x.shape[0], x.dtype, self.bias)
        rows = reference.quantized_input(x, self.scheme, self.layout)[:, self.channels]
        y = rows @ self.linear.dequantized().T
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def row_bounds(layer: Any, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Which rows of each projection this rank has; key and value heads fewer than ranks are held by several."""
    if isinstance(layer, RowParallelLinear | ReplicatedLinear):
        return [(0, size) for size in sizes]
    ranks = [layer.tp_rank] * len(sizes)
    if isinstance(layer, QKVParallelLinear):
        ranks[1:] = [layer.tp_rank // layer.num_kv_head_replicas] * 2
    elif not isinstance(layer, MergedColumnParallelLinear) and len(sizes) != 1:
        raise UnsupportedError(f"vLLM merges the projections of {layer.prefix} in a way that atom doesn't know")
    return [(rank * size, (rank + 1) * size) for rank, size in zip(ranks, sizes, strict=True)]


def row_shard(
    name: str, scheme: Scheme, entry: Mapping[str, Any], layer: Any, dtype: torch.dtype, device: torch.device
) -> Shard:
    """This rank's part of o or down."""
    rows, columns = entry["out_features"], entry["in_features"]
    split = split_rows(
        name,
        scheme,
        rows,
        columns,
        layer.tp_size,
        permuted=entry.get("permutation", False),
        kernels=dispatch.choose(scheme, device, columns).kernel is not None,
    )
    part = split.parts[layer.tp_rank]
    module = _module(part, scheme, columns, {} if split.gathered else entry, dtype, device)
    if split.gathered:
        kinds = {"permutation": permutation_dtype(columns), "signs": torch.int8}
        for kind, stored in kinds.items():
            whole = torch.empty(columns, dtype=stored, device=device) if entry.get(kind, False) else None
            module.register_buffer(WHOLE + kind, whole)
    return Shard(name, scheme, columns, part, module, split.gathered)


def _module(
    part: Part, scheme: Scheme, columns: int, entry: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> QuantLinear:
    return QuantLinear(
        part.in_features(scheme),
        part.rows[1] - part.rows[0],
        part.scheme(scheme),
        permutation=entry.get("permutation", False),
        signs=entry.get("signs", False),
        dtype=dtype,
        device=device,
    )


def _load(shards: Sequence[Shard], suffix: str, slot: nn.Parameter, tensor: Tensor, shard_id: Any = None) -> None:
    shards[SHARD_IDS.get(shard_id, shard_id)].load(suffix, tensor)
