"""The quantization method `atom` in vLLM: what a checkpoint's config.json means for each layer, and what is refused."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from atomcli.errors import UnsupportedError
from atomcli.formats.scheme import Scheme
from atomcli.integrations.vllm.attention import AtomCacheMethod
from atomcli.integrations.vllm.experts import AtomExpertsMethod
from atomcli.integrations.vllm.linear import AtomLinearMethod
from atomcli.kernels import dispatch
from atomcli.runtime.decoder import KEEP_DEQUANTIZED_BYTES
from atomcli.runtime.linear import scheme_of
from atomcli.runtime.saved import Plan

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Where vLLM's modules are called otherwise than a checkpoint's tensors.
MODULES = {"MixtralForCausalLM": {".mlp.": ".block_sparse_moe."}}


class AtomConfig(QuantizationConfig):
    """quantization_config of an atom checkpoint, as vLLM wants it.

    Raises InputError for a config that this version can't read, UnsupportedError when a layer is asked for under
    options that can't be honoured.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.cache_biases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.dummy = False
        self.dtype = torch.bfloat16
        self.most_tokens = 1  # of a batch
        self.loaded_shapes: set[tuple[Any, ...]] = set()
        self._renamed: dict[str, str] = {}
        self._checked = False
        self._kept_bytes = 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AtomConfig":
        """From config.json's quantization_config."""
        return cls(Plan.from_dict(config))

    @classmethod
    def get_name(cls) -> Any:
        """The quant_method of config.json."""
        return "atom"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes of a model; kernels take the two of 16 bits."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere; `check` says precisely which cards have kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """How vLLM's model calls the modules of a checkpoint's tensors; no scale of the cache is stored."""
        return WeightsMapper(orig_to_new_substr=self._renamed | {".self_attn.key_center": ".self_attn.attn.key_center"})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer of the model is stored and run; None leaves it to vLLM."""
        if not self._checked:
            self._check(get_current_vllm_config())
        if isinstance(layer, LinearBase):
            names = self.names(prefix)
            biases = self.keeps_bias_apart and prefix.endswith(".qkv_proj")
            if biases or any(name in self.plan.linears for name in names):
                return AtomLinearMethod(self, names)
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return AtomExpertsMethod(self, layer, self._name(prefix))
        if isinstance(layer, Attention) and self.plan.kv_cache.element != "float":
            return AtomCacheMethod(self)
        return None

    def names(self, prefix: str) -> list[str]:
        """The names in the checkpoint of what vLLM calls `prefix`: several where it merged them."""
        parent, _, kind = self._name(prefix).rpartition(".")
        return [f"{parent}.{projection}" for projection in MERGED.get(kind, (kind,))]

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of a linear, None where it stayed in 16 bits."""
        entry = self.plan.linears.get(name)
        return None if entry is None else scheme_of(entry, self.plan.schemes)

    @property
    def keeps_bias_apart(self) -> bool:
        """Whether keys and values are cached without the bias of their projections."""
        return self.plan.kv_cache.element != "float" and self.plan.kv_cache.bias_free

    def has_room(self, size: int) -> bool:
        """Whether the reference path may keep `size` more bytes of unpacked weights."""
        self._kept_bytes += size
        return self._kept_bytes <= KEEP_DEQUANTIZED_BYTES

    def _name(self, prefix: str) -> str:
        for ours, theirs in self._renamed.items():
            prefix = prefix.replace(theirs, ours)
        return prefix

    def _check(self, vllm: Any) -> None:
        """Take what the engine's options say, and refuse those that can't be honoured."""
        self.dtype = vllm.model_config.dtype
        self.dummy = vllm.load_config.load_format == "dummy"
        self.most_tokens = vllm.scheduler_config.max_num_batched_tokens
        for architecture in vllm.model_config.architectures:
            self._renamed |= MODULES.get(architecture, {})
        check_options(vllm, self.plan)
        check_ranks(self.plan, vllm.parallel_config.tensor_parallel_size)
        if vllm.device_config.device_type == "cuda":
            check_kernels(self.plan, self.dtype)
        self._checked = True


def check_options(vllm: Any, plan: Plan) -> None:
    """Raise UnsupportedError for an option of the engine that an atom checkpoint can't be served with."""
    parallel, cache = vllm.parallel_config, vllm.cache_config.cache_dtype
    quantized = plan.kv_cache.element != "float"
    refused = {
        "--enable-lora": vllm.lora_config is not None,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--kv-transfer-config": quantized and vllm.kv_transfer_config is not None,
    }
    for option, given in refused.items():
        if given:
            raise UnsupportedError(f"An atom checkpoint can't be served with {option}", "Leave the option out")
    if plan.kv_blocks:
        raise UnsupportedError(
            "vLLM's pages can't hold the cache of some blocks in another format than that of the others",
            "Compress without kv_cache.int8, or run it through transformers",
        )
    if quantized and cache != "auto":
        raise UnsupportedError(
            f"The checkpoint keeps its KV cache in {plan.kv_cache.element}; --kv-cache-dtype {cache} contradicts it",
            "Leave --kv-cache-dtype out",
        )


def check_ranks(plan: Plan, ranks: int) -> None:
    """Raise UnsupportedError for a tensor-parallel size that doesn't divide some linear."""
    if ranks == 1:
        return
    for name, entry in plan.linears.items():
        kind = name.rpartition(".")[2]
        if ".experts." in name or kind in ("k_proj", "v_proj"):
            continue  # whole experts are dealt to the ranks; key and value heads are repeated where they are too few
        sides = ("in_features", "out_features") if kind in ("o_proj", "down_proj") else ("out_features",)
        for side in sides:
            if entry[side] % ranks:
                raise UnsupportedError(
                    f"{name} has {entry[side]} {side}, which --tensor-parallel-size {ranks} doesn't divide",
                    "Use a size that divides it",
                )


def check_kernels(plan: Plan, dtype: torch.dtype) -> None:
    """Raise UnsupportedError when the GPU has no kernel for a linear: the reference would be slower than bf16."""
    if dtype == torch.float32:
        raise UnsupportedError("On a GPU an atom checkpoint is served in bfloat16 or float16, not float32")
    seen: Sequence[tuple[str, Scheme, int]] = [
        (name, scheme_of(entry, plan.schemes), int(entry["in_features"])) for name, entry in plan.linears.items()
    ]
    for name, scheme, in_features in seen:
        choice = dispatch.choose(scheme, "cuda", in_features)
        if choice.kernel is None:
            raise UnsupportedError(
                f"No kernel serves {name} ({scheme.name}) on this GPU: {choice.reason}",
                "`atom doctor` lists the schemes that it serves",
            )
