"""Decoder blocks and models: transformers' own classes around our attention, experts and linears.

The pipeline builds one block at a time, `load_parent` and `load_checkpoint` whole models; all of them are made of the
same modules, so they compute the same numbers.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from atomcli.errors import InputError, UnsupportedError
from atomcli.formats.scheme import KVFormat
from atomcli.models.block import Family
from atomcli.models.registry import describe
from atomcli.models.tensors import account, block_name, block_tensors, outer_tensors
from atomcli.runtime import saved
from atomcli.runtime.attention import Attention
from atomcli.runtime.experts import Experts
from atomcli.runtime.linear import QuantLinear, keep_dequantized_weights, share_inputs
from atomcli.runtime.wide import widen

FLOAT_CACHE = KVFormat("float")

# Up to here the reference path keeps its unpacked weights: it is the difference between slow and unusable decoding.
KEEP_DEQUANTIZED_BYTES = 2**30

_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class TensorSource(Protocol):
    """What `load_parent` needs of a checkpoint source."""

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


def empty_block(family: Family, config: PreTrainedConfig, index: int, kv: KVFormat = FLOAT_CACHE) -> nn.Module:
    """Decoder layer `index` on the meta device, with our attention and experts; its linears are nn.Linear."""
    with _described(family.prefix):
        return adapt_block(_made(family, "DecoderLayer", config, index), kv)


def adapt_block(layer: Any, kv: KVFormat) -> nn.Module:
    """Put our attention and experts into one of transformers' decoder layers that still lies on the meta device."""
    layer.self_attn = Attention(layer.self_attn, kv)
    fused = getattr(layer.mlp, "experts", None)
    if fused is not None:
        layer.mlp.experts = Experts.replacing(fused)
    widen(layer)
    return layer.eval()


def build_block(
    family: Family,
    config: PreTrainedConfig,
    index: int,
    tensors: Mapping[str, Tensor],
    kv_format: KVFormat = FLOAT_CACHE,
) -> nn.Module:
    """Decoder layer `index` in full precision around `tensors`, which are used, not copied.

    `tensors` are named relative to the block as in `block_tensors`. Raises InputError naming tensors that are missing,
    left over or misshapen, UnsupportedError for a cache format the family can't have.
    """
    block = empty_block(family, config, index, kv_format)
    _assign(block, tensors, block_name(index))
    return block


def read_block(family: Family, index: int, source: TensorSource, kv_format: KVFormat = FLOAT_CACHE) -> nn.Module:
    """Decoder layer `index` of a source in full precision; only its own tensors are read."""
    names = block_tensors(family, source.config, index)
    return build_block(
        family, source.config, index, {name: source.read(disk) for name, disk in names.items()}, kv_format
    )


def quantize_linear(block: nn.Module, name: str, linear: QuantLinear) -> None:
    """Put a quantized linear in the place of linear `name` (relative to the block).

    The linears of its site quantize their input together from then on, where they are all alike.
    """
    block.set_submodule(name, linear)
    parent, _, kind = name.rpartition(".")
    experts = block.get_submodule(parent.rpartition(".")[0])
    if isinstance(experts, Experts):
        experts.changed()
    for kinds in _SHARED_INPUTS:
        if kind in kinds:
            share_inputs([block.get_submodule(f"{parent}.{other}") for other in kinds])


def empty_model(family: Family, config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model without its blocks, on the meta device except for what the config alone determines."""
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    model = _made(family, "ForCausalLM", config)
    model.model.layers = nn.ModuleList()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    widen(model)
    return model.eval()


def read_outer(family: Family, source: TensorSource) -> PreTrainedModel:
    """The model around the blocks: embedding, RoPE, final norm and head of a source, and an empty list of blocks."""
    config = copy.deepcopy(source.config)
    config.dtype = source.dtype
    model = empty_model(family, config)
    names = outer_tensors(family, config)
    _assign_outer(model, {name: source.read(disk) for name, disk in names.items()})
    return model


def block_arguments(model: PreTrainedModel, family: Family, index: int, hidden: Tensor) -> dict[str, Any]:
    """What block `index` gets beside hidden (batch, tokens, hidden) when the model runs unpadded, without a cache."""
    config = model.config
    position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    window = family.window(config, index)
    make_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask = make_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=position_ids
    )
    return {
        "attention_mask": mask,
        "position_ids": position_ids,
        "position_embeddings": model.model.rotary_emb(hidden, position_ids=position_ids),
    }


def embed(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Input of the first block, (batch, tokens, hidden), from token ids (batch, tokens)."""
    return model.model.embed_tokens(input_ids)


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (batch, tokens, vocabulary) from the last block's output."""
    return model.lm_head(model.model.norm(hidden))


def load_parent(source: TensorSource, kv_format: KVFormat = FLOAT_CACHE) -> PreTrainedModel:
    """The full-precision model of a source; each tensor is held once.

    Raises UnsupportedError for an unknown architecture, InputError when the tensors are not exactly those of the
    architecture.
    """
    family = describe(source.config)
    account(family, source.config, source.names(), source.shape)
    model = read_outer(family, source)
    for index in range(source.config.num_hidden_layers):
        model.model.layers.append(read_block(family, index, source, kv_format))
    return model


def quantize_skeleton(model: PreTrainedModel, plan: saved.Plan, dtype: torch.dtype) -> None:
    """Give a model on the meta device the modules of a checkpoint: attention, experts and empty quantized linears.

    Raises InputError when the plan names a linear that the model doesn't have, UnsupportedError for a model that is
    not a causal language model of a known family, or that is to attend by other means than torch's SDPA.
    """
    describe(model.config)
    if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
        raise UnsupportedError(
            f"An atom checkpoint is a causal language model; it can't be loaded as {type(model).__name__}",
            "Load it with AutoModelForCausalLM.",
        )
    if model.config._attn_implementation != "sdpa":
        raise UnsupportedError(
            f"Atom's attention runs on torch's SDPA, not on attn_implementation={model.config._attn_implementation!r}",
            "Leave attn_implementation out.",
        )
    for index, layer in enumerate(model.model.layers):
        adapt_block(layer, plan.cache_of(index))
    widen(model)  # the head of one that transformers made
    for name, entry in plan.linears.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise InputError(
                f"quantization_config names the linear {name}, which a {type(model).__name__} of this config lacks",
                "config.json was edited or belongs to another checkpoint.",
            )
        if (linear.out_features, linear.in_features) != (entry["out_features"], entry["in_features"]):
            raise InputError(
                f"quantization_config says {name} is {entry['out_features']} x {entry['in_features']}; the model's "
                f"config says {linear.out_features} x {linear.in_features}",
                "config.json was edited or belongs to another checkpoint.",
            )
        if entry.get("bias", False) != (linear.bias is not None):
            raise InputError(
                f"quantization_config and the model's config disagree on whether {name} has a bias",
                "config.json was edited or belongs to another checkpoint.",
            )
        model.set_submodule(name, QuantLinear.from_entry(entry, plan.schemes, dtype, "meta"))


def finish_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a loaded checkpoint to run: sites share their quantized input, small models keep unpacked weights."""
    for parent in model.model.layers.modules():
        for kinds in _SHARED_INPUTS:
            share_inputs([getattr(parent, kind) for kind in kinds if hasattr(parent, kind)])
    keep_dequantized_weights(model, KEEP_DEQUANTIZED_BYTES)
    return model.eval()


def load_checkpoint(directory: Path | str) -> PreTrainedModel:
    """The quantized model of a checkpoint directory, on the CPU; the same modules and numbers as `from_pretrained`.

    Raises InputError when a tensor is missing, left over, or of another shape or dtype than the config says.
    """
    directory = Path(directory)
    config = saved.read_config(directory)
    plan = saved.Plan.of(config)
    family = describe(config)
    model = empty_model(family, config)
    model.model.layers.extend(
        _made(family, "DecoderLayer", model.config, index) for index in range(config.num_hidden_layers)
    )
    quantize_skeleton(model, plan, config.dtype)
    files = saved.checkpoint_files(directory)
    saved.check_tensors(model, files)
    _assign_outer(model, saved.read_tensors(files))
    model._weight_conversions = []  # save_pretrained writes the names in memory, which are a checkpoint's
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return finish_quantized(model)


def _made(family: Family, kind: str, config: PreTrainedConfig, *arguments: Any) -> Any:
    """One of transformers' modules on the meta device; InputError when the config describes none."""
    create: Callable[..., Any] = getattr(importlib.import_module(family.module), family.prefix + kind)
    with _described(family.prefix), torch.device("meta"):
        return create(config, *arguments)


@contextmanager
def _described(prefix: str) -> Iterator[None]:
    """InputError for a config that no model can be made of, whatever makes transformers or us stumble over it."""
    try:
        yield
    # That depends on the value: an unknown activation is a KeyError, a padding token too high an assertion.
    except (
        LookupError, AttributeError, ValueError, TypeError, ArithmeticError, RuntimeError, AssertionError
    ) as error:  # fmt: skip
        raise InputError(
            f"config.json describes no {prefix} model that transformers can make: {error!r}", "Copy config.json again"
        ) from error


def _assign(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    expected = module.state_dict()
    wrong = sorted(name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape)
    for names, what in (
        (sorted(expected.keys() - tensors.keys()), "lacks"),
        (sorted(tensors.keys() - expected.keys()), "has no place for"),
        (wrong, "has another shape for"),
    ):
        if names:
            raise InputError(f"{where} {what} {', '.join(names[:3])}", "The files belong to another model.")
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    module.requires_grad_(False)


def _assign_outer(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    tensors = dict(tensors)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    _assign(model, tensors, "The model")
    model.tie_weights()
