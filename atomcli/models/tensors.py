"""Every tensor of a model, accounted for: its name in a block, its name on disk, and the shape it must have."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from atomcli.errors import InputError
from atomcli.models.block import Family, head_dim

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# Old checkpoints carry the RoPE frequencies, which every model computes from its config.
_RECOMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Account:
    """What becomes of a model's tensors, by their names on disk.

    `quantizable` maps module names of linears (model.layers.0.self_attn.q_proj) to the disk names of their weights;
    `kept` maps tensor names of the model to disk names; `ignored` are disk names that carry no information.
    """

    quantizable: Mapping[str, str]
    kept: Mapping[str, str]
    ignored: frozenset[str]


def block_name(index: int) -> str:
    """Module name of a block in the model."""
    return f"model.layers.{index}"


def block_shapes(family: Family, config: PreTrainedConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of block `index`, by its name in the block (self_attn.q_proj.weight)."""
    hidden, dim = config.hidden_size, head_dim(config)
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    width = config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if family.head_norms:
        shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    if family.experts is not None and family.is_sparse(config, index):
        width = getattr(config, family.experts.width)
        shapes["mlp.gate.weight"] = (family.expert_count(config, index), hidden)
    linear_shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    for linear in family.linears(config, index):
        shape = linear_shapes[linear.rpartition(".")[2]]
        shapes[f"{linear}.weight"] = shape
        if family.has_bias(config, linear):
            shapes[f"{linear}.bias"] = shape[:1]
    return shapes


def block_tensors(family: Family, config: PreTrainedConfig, index: int) -> dict[str, str]:
    """Disk name of every tensor of block `index`, by its name in the block (self_attn.q_proj.weight)."""
    sparse = family.is_sparse(config, index)
    return {
        name: f"{block_name(index)}.{_disk_name(family, name) if sparse else name}"
        for name in block_shapes(family, config, index)
    }


def outer_shapes(family: Family, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the embedding, the final norm and, unless it is tied to the embedding, the head."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def outer_tensors(family: Family, config: PreTrainedConfig) -> dict[str, str]:
    """Disk names of the tensors outside the blocks, by their names in the model."""
    return {name: name for name in outer_shapes(family, config)}


def account(
    family: Family,
    config: PreTrainedConfig,
    names: Iterable[str],
    shape: Callable[[str], tuple[int, ...]] | None = None,
) -> Account:
    """Account for every tensor of a model before anything is spent on it.

    `names` are the tensors on disk; `shape` looks one's shape up without reading it. Raises InputError naming
    tensors that are missing, that belong nowhere, or that have the wrong shape.
    """
    _refuse_routing(family, config)
    present = frozenset(names)
    _refuse_more_than(len(present), family, config)
    quantizable: dict[str, str] = {}
    kept = outer_tensors(family, config)
    shapes = {kept[name]: expected for name, expected in outer_shapes(family, config).items()}
    for index in range(config.num_hidden_layers):
        weights = {f"{linear}.weight" for linear in family.linears(config, index)}
        expected_shapes = block_shapes(family, config, index)
        for name, disk in block_tensors(family, config, index).items():
            shapes[disk] = expected_shapes[name]
            full = f"{block_name(index)}.{name}"
            if name in weights:
                quantizable[full.removesuffix(".weight")] = disk
            else:
                kept[full] = disk
    ignored = {name for name in present if name.endswith(_RECOMPUTED)}
    if config.tie_word_embeddings and HEAD in present:
        ignored.add(HEAD)
    _refuse(shapes.keys() - present, "lacks", "The files are incomplete, or config.json belongs to another model.")
    _refuse(
        present - shapes.keys() - ignored,
        f"has, beyond what {config.num_hidden_layers} {family.prefix} blocks consist of,",
        "Every tensor must be accounted for: config.json belongs to another model, or this is an extended one.",
    )
    if shape is not None:
        for name, expected in shapes.items():
            if tuple(shape(name)) != expected:
                raise InputError(
                    f"Tensor {name} has shape {list(shape(name))}; the config says {list(expected)}",
                    "The files and config.json belong to different models.",
                )
    return Account(quantizable, kept, frozenset(ignored))


def _refuse_more_than(tensors: int, family: Family, config: PreTrainedConfig) -> None:
    """A damaged count would have us look for billions of tensors."""
    experts = 0 if family.experts is None else getattr(config, family.experts.count)
    for what, count in (("blocks", config.num_hidden_layers), ("experts", experts)):
        if count > tensors:
            raise InputError(
                f"config.json says {count} {what}, but the files hold {tensors} tensors", "Copy config.json again"
            )


def _refuse_routing(family: Family, config: PreTrainedConfig) -> None:
    count = 0 if family.experts is None else getattr(config, family.experts.count)
    if count <= 0:
        return
    if not 0 < config.num_experts_per_tok <= count:
        raise InputError(
            f"config.json routes each token to {config.num_experts_per_tok} experts of {count}",
            "Copy config.json again.",
        )
    if getattr(config, "decoder_sparse_step", 1) < 1:
        raise InputError(
            f"config.json has decoder_sparse_step {config.decoder_sparse_step}; it is at least 1",
            "Copy config.json again.",
        )


def _disk_name(family: Family, name: str) -> str:
    experts = family.experts
    if experts is None or not name.startswith("mlp."):
        return name
    names = dict(zip(("gate_proj", "up_proj", "down_proj"), experts.disk_linears, strict=True))
    parts = [names.get(part, part) if ".experts." in name else part for part in name.split(".")]
    return ".".join([experts.disk, *parts[1:]])


def _refuse(names: Iterable[str], what: str, hint: str) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise InputError(f"The model {what} {', '.join(listed[:3])}{more}", hint)
