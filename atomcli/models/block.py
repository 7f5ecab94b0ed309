"""What a description says: the linears of a block by the input they share, its experts, biases and norms.

A description is data. It never repeats what transformers' own layer class already does (norms, residuals, routing);
it says only what quantization has to know, and how the tensors are called on disk.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

Bias = bool | str
"""Whether a linear has a bias: always, never, or as the named attribute of the config says."""

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


@dataclass(frozen=True)
class Site:
    """Linears that read the same input, so that they share its permutation and its quantization.

    `linears` are module names relative to the block; of an expert site they contain "{expert}", and every expert reads
    the tokens that are routed to it.
    """

    name: Literal["qkv", "o", "gate_up", "down"]
    linears: tuple[str, ...]
    expert: bool = False

    def of_expert(self, expert: int) -> tuple[str, ...]:
        """The linears of one expert."""
        return tuple(linear.format(expert=expert) for linear in self.linears)


@dataclass(frozen=True)
class Fold:
    """A site whose input permutation can be folded into the output rows of the linears that produce the input.

    With `within_heads`, only a permutation that stays inside each head and is the same for all query heads of a
    key/value head can be folded; any other needs a gather at run time.
    """

    site: Literal["o", "down"]
    into: tuple[str, ...]
    within_heads: bool = False


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture: config attributes of their number and width, and their names on disk.

    `disk` is the disk name of the block's `mlp`; `disk_linears` the disk names of gate, up and down.
    """

    count: str
    width: str
    disk: str = "mlp"
    disk_linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One architecture, described: `module` and `prefix` name transformers' classes (LlamaDecoderLayer, ...).

    `attention_bias` is for q, k, v; `output_bias` for o; `mlp_bias` for gate, up, down. `sliding` says which layers
    attend through a window: none, all when the config has one, or those that config.layer_types marks.
    """

    name: str
    architectures: tuple[str, ...]
    module: str
    prefix: str
    attention_bias: Bias = False
    output_bias: Bias = False
    mlp_bias: Bias = False
    head_norms: bool = False
    sliding: Literal["never", "config", "layer_types"] = "never"
    experts: Experts | None = None

    def is_sparse(self, config: PreTrainedConfig, index: int) -> bool:
        """Whether block `index` routes its tokens to experts; otherwise it has a dense MLP."""
        if self.experts is None or getattr(config, self.experts.count) <= 0:
            return False
        step = getattr(config, "decoder_sparse_step", 1)
        return index not in (getattr(config, "mlp_only_layers", None) or ()) and (index + 1) % step == 0

    def expert_count(self, config: PreTrainedConfig, index: int) -> int:
        """Number of experts of block `index`; 0 for a dense one."""
        if self.experts is None or not self.is_sparse(config, index):
            return 0
        return int(getattr(config, self.experts.count))

    def sites(self, config: PreTrainedConfig, index: int) -> tuple[Site, ...]:
        """The sites of block `index`, in the order of the data."""
        expert = self.is_sparse(config, index)
        mlp = "mlp.experts.{expert}." if expert else "mlp."
        return (
            Site("qkv", ATTENTION[:3]),
            Site("o", ATTENTION[3:]),
            Site("gate_up", (mlp + "gate_proj", mlp + "up_proj"), expert),
            Site("down", (mlp + "down_proj",), expert),
        )

    def folds(self, config: PreTrainedConfig, index: int) -> tuple[Fold, ...]:
        """Where the permutations of block `index` can go instead of a gather."""
        gate_up = self.sites(config, index)[2].linears
        return (Fold("o", ("self_attn.v_proj",), within_heads=True), Fold("down", gate_up))

    def linears(self, config: PreTrainedConfig, index: int) -> tuple[str, ...]:
        """All linears of block `index` that can be quantized, relative to the block, experts spelled out."""
        experts = range(self.expert_count(config, index))
        names: list[str] = []
        for site in self.sites(config, index):
            if site.expert:
                names += [name for expert in experts for name in site.of_expert(expert)]
            else:
                names += site.linears
        return tuple(names)

    def has_bias(self, config: PreTrainedConfig, linear: str) -> bool:
        """Whether a linear (relative to the block) has a bias."""
        kind = linear.rpartition(".")[2]
        bias = {"q_proj": self.attention_bias, "k_proj": self.attention_bias, "v_proj": self.attention_bias}.get(kind)
        if bias is None:
            bias = self.output_bias if kind == "o_proj" else self.mlp_bias
        if ".experts." in linear:
            bias = False
        return bool(getattr(config, bias)) if isinstance(bias, str) else bias

    def window(self, config: PreTrainedConfig, index: int) -> int | None:
        """Length of the sliding window of block `index`, or None where it attends to everything."""
        if self.sliding == "never" or getattr(config, "sliding_window", None) is None:
            return None
        if self.sliding == "layer_types" and config.layer_types[index] != "sliding_attention":
            return None
        return int(config.sliding_window)


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of one attention head; a config may set it apart from hidden_size / heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
