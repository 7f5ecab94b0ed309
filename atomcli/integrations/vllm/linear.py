"""Linears in vLLM: each projection of a merged layer keeps its scheme, layout and tensors, whole or its rank's part.

vLLM fuses q, k, v and gate, up into one layer; an atom checkpoint stores each with a scheme of its own. So a layer
holds one module per projection until its tensors are there, and then a `Projection`, which runs them in as few products
as their schemes allow. All that torch.compile sees is one operator, `atom::served_linear`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from atomcli.integrations.vllm import operators
from atomcli.integrations.vllm.dummy import fill
from atomcli.integrations.vllm.sharding import tensor_part
from atomcli.kernels import tune
from atomcli.runtime.linear import QuantLinear
from atomcli.runtime.projection import Projection

SHARD_IDS: Mapping[Any, int] = {None: 0, "q": 0, "k": 1, "v": 2}


@dataclass
class Shard:
    """One projection of a layer on this rank: its name in the checkpoint, its rows [start, stop), and their module.

    A projection that stayed in 16 bits has an nn.Linear.
    """

    name: str
    rows: tuple[int, int]
    module: QuantLinear | nn.Linear
    loaded: set[str] = field(default_factory=set)

    def load(self, suffix: str, tensor: Tensor) -> None:
        """Take this rank's part of a checkpoint tensor; InputError when it isn't what config.json says."""
        share, target = tensor_part(suffix, tensor, self.rows), self.tensors().get(suffix)
        packed = isinstance(self.module, QuantLinear)
        if target is None or target.shape != share.shape or (packed and target.dtype != share.dtype):
            raise InputError(
                f"Tensor {self.name}.{suffix} is {tensor.dtype} {list(tensor.shape)}, which config.json contradicts",
                "config.json and the tensors belong to different checkpoints",
            )
        target.copy_(share)
        self.loaded.add(suffix)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be loaded, by suffix; vLLM loads a layer's bias itself."""
        return {name: tensor for name, tensor in self.module.state_dict().items() if name != "bias"}


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
        """Make room for this rank's rows of every projection."""
        shards = [
            Shard(name, rows, self._module(name, input_size, rows[1] - rows[0], params_dtype))
            for name, rows in zip(self.names, row_bounds(layer, output_partition_sizes), strict=True)
        ]
        layer.atom_shards = shards
        # A slot per kind of tensor lets vLLM's loader find a parameter of that name; the tensors lie in the shards.
        kinds = {suffix: tensor.dtype for shard in shards for suffix, tensor in shard.tensors().items()}
        for suffix, dtype in kinds.items():
            slot = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(slot, {"weight_loader": partial(_load, shards, suffix)})
            layer.register_parameter(suffix, slot)
        layer.register_buffer("atom_handle", operators.handle(), persistent=False)
        layer.atom_in_features, layer.atom_out_features = input_size, sum(output_partition_sizes)
        if gathers(layer):
            if not layer.reduce_results:
                raise UnsupportedError(f"{layer.prefix} leaves its sum over the ranks to another layer; atom has none")
            layer.reduce_results = False  # every rank has the whole output

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
        run = Projection([shard.module for shard in shards], self.config.dtype, biased).plain
        del layer.atom_shards
        operators.serve(layer.atom_handle, gathered(run) if gathers(layer) else run)
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
        """x (..., in_features of the rank) -> (..., out_features of the rank); of o and down all of them."""
        y: Tensor = torch.ops.atom.served_linear(x, layer.atom_handle, layer.atom_out_features)
        return y

    def _module(self, name: str, columns: int, rows: int, dtype: torch.dtype) -> QuantLinear | nn.Linear:
        """Room for `rows` rows of a projection."""
        scheme, device = self.config.scheme(name), torch.get_default_device()
        if scheme is None:
            return nn.Linear(columns, rows, bias=False, dtype=dtype, device=device).requires_grad_(False)
        entry = self.config.plan.linears[name]
        kinds = {kind: entry.get(kind, False) for kind in ("permutation", "signs")}
        return QuantLinear(columns, rows, scheme, **kinds, dtype=dtype, device=device)

    def _take_bias(self, layer: Any, shards: Sequence[Shard]) -> list[bool]:
        """Give the projections their rows of the layer's bias; those that the cache holds apart go to the attention."""
        biased = [True] * len(shards)
        if layer.bias is None or layer.skip_bias_add:
            return biased
        bias = layer.bias.data[slice(*shards[0].rows)] if gathers(layer) else layer.bias.data
        pieces = bias.split([shard.module.out_features for shard in shards])
        for shard, piece in zip(shards, pieces, strict=True):
            shard.module.bias = nn.Parameter(piece, False) if isinstance(shard.module, nn.Linear) else piece
        if isinstance(layer, QKVParallelLinear) and self.config.keeps_bias_apart:
            attention = layer.prefix.removesuffix("qkv_proj") + "attn"
            self.config.cache_biases[attention] = (pieces[1], pieces[2])
            biased[1:] = [False, False]
        return biased


def gathers(layer: Any) -> bool:
    """Whether the ranks have parts of the layer's input, and each is to have its whole output."""
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1


def gathered(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `run` makes of the whole input, from this rank's channels of it, and what it makes on all ranks."""

    def whole(x: Tensor) -> Tensor:
        y: Tensor = tensor_model_parallel_all_gather(run(tensor_model_parallel_all_gather(x, dim=-1)), dim=-1)
        return y

    return whole


def row_bounds(layer: Any, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Which rows of each projection this rank has; key and value heads fewer than ranks are held by several."""
    if isinstance(layer, ReplicatedLinear):
        return [(0, size) for size in sizes]
    if isinstance(layer, RowParallelLinear):
        sizes = [size // layer.tp_size for size in sizes]
    ranks = [layer.tp_rank] * len(sizes)
    if isinstance(layer, QKVParallelLinear):
        ranks[1:] = [layer.tp_rank // layer.num_kv_head_replicas] * 2
    elif not isinstance(layer, MergedColumnParallelLinear) and len(sizes) != 1:
        raise UnsupportedError(f"vLLM merges the projections of {layer.prefix} in a way that atom doesn't know")
    return [(rank * size, (rank + 1) * size) for rank, size in zip(ranks, sizes, strict=True)]


def _load(shards: Sequence[Shard], suffix: str, slot: nn.Parameter, tensor: Tensor, shard_id: Any = None) -> None:
    shards[SHARD_IDS.get(shard_id, shard_id)].load(suffix, tensor)
