"""Experts in vLLM: its router chooses, ours run. With tensor parallelism each rank holds whole experts.

Dealing experts to ranks keeps every expert's numbers those of one rank, and needs no group to be cut: a rank adds up
what its own experts give, and vLLM sums over the ranks.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from atomcli.errors import InputError, UnsupportedError
from atomcli.integrations.vllm import operators
from atomcli.integrations.vllm.dummy import fill
from atomcli.runtime.experts import Expert, Experts
from atomcli.runtime.grouped_experts import GroupedExperts
from atomcli.runtime.linear import QuantLinear

# Mixtral's loader in vLLM knows the projections by their names on its authors' disks.
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class AtomExpertsMethod(FusedMoEMethodBase):
    """The experts of one block; `name` is their module's in the checkpoint."""

    def __init__(self, config: Any, layer: Any, name: str) -> None:
        super().__init__(layer.moe_config)
        self.config, self.name = config, name
        self.rank, self.ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Make room for this rank's experts: every `ranks`-th of them."""
        count = layer.global_num_experts
        if layer.activation.value != "silu" or layer.apply_router_weight_on_input or count < self.ranks:
            raise UnsupportedError(
                f"{self.name} has {count} experts with the activation {layer.activation.value}; atom serves at least "
                f"one per rank ({self.ranks}), with silu, weighted on their output"
            )
        width = layer.moe_config.intermediate_size_per_partition * layer.moe_config.tp_size
        experts = []
        for index in range(self.rank, count, self.ranks):
            expert = Expert(layer.hidden_size, width, nn.SiLU(), "meta")
            for kind in PROJECTIONS.values():
                setattr(expert, kind, self._linear(f"{self.name}.{index}.{kind}", getattr(expert, kind)))
            experts.append(expert)
        self.experts = Experts(experts).requires_grad_(False)
        self.missing = set(self.experts.state_dict())
        layer.load_weights = self.load
        layer.register_buffer("atom_handle", operators.handle(), persistent=False)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Take the tensors of this rank's experts, named as 3.gate_proj.weight_packed."""
        state = self.experts.state_dict()
        for name, tensor in weights:
            index, kind, suffix = name.split(".")
            yield name
            if int(index) % self.ranks != self.rank:
                continue
            own = f"{int(index) // self.ranks}.{PROJECTIONS.get(kind, kind)}.{suffix}"
            if own not in state or state[own].shape != tensor.shape or not _castable(state[own], tensor):
                raise InputError(
                    f"Tensor {self.name}.{name} is {tensor.dtype} {list(tensor.shape)}, which config.json contradicts",
                    "config.json and the tensors belong to different checkpoints",
                )
            state[own].copy_(tensor)
            self.missing.discard(own)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack the experts for their kernel, where there is one."""
        if self.config.dummy:
            for linear in (module for module in self.experts.modules() if isinstance(module, QuantLinear | nn.Linear)):
                fill(linear.state_dict())
        elif self.missing:
            raise InputError(f"The checkpoint lacks a tensor of {self.name}: {min(self.missing)}")
        for linear in (module for module in self.experts.modules() if isinstance(module, QuantLinear)):
            linear.keep_dequantized = self.config.has_room(4 * linear.in_features * linear.out_features)
        if next(self.experts.buffers(), torch.empty(0)).device.type != "cuda":
            operators.serve(layer.atom_handle, self.experts)
            return
        choice = self.experts.kernel_choice()
        if choice.kernel is None:
            raise UnsupportedError(f"No kernel serves the experts {self.name} on this GPU: {choice.reason}")
        operators.serve(layer.atom_handle, GroupedExperts.of(list(self.experts)))
        del self.experts

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (tokens, hidden), the experts of each token and their weights (tokens, k) -> this rank's addend."""
        if self.ranks > 1:
            # Static shapes: a choice that lies elsewhere counts for expert 0, with no weight.
            mine = topk_ids % self.ranks == self.rank
            topk_ids = torch.where(mine, topk_ids // self.ranks, 0)
            topk_weights = torch.where(mine, topk_weights, 0)
        y: Tensor = torch.ops.atom.served_experts(x, topk_ids, topk_weights, layer.atom_handle)
        return y

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels take no part."""

    def _linear(self, name: str, original: nn.Linear) -> nn.Linear | QuantLinear:
        rows, columns, dtype = original.out_features, original.in_features, self.config.dtype
        entry = self.config.plan.linears.get(name)
        if entry is None:
            return nn.Linear(columns, rows, bias=False, dtype=dtype)
        if (entry["out_features"], entry["in_features"]) != (rows, columns):
            raise InputError(
                f"quantization_config says {name} is {entry['out_features']} x {entry['in_features']}; the model's "
                f"config says {rows} x {columns}",
                "config.json was edited or belongs to another checkpoint",
            )
        return QuantLinear.from_entry(entry, self.config.plan.schemes, dtype, None)


def _castable(target: Tensor, tensor: Tensor) -> bool:
    return target.dtype == tensor.dtype or (target.is_floating_point() and tensor.is_floating_point())
