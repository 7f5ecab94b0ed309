"""Which GGUF tensors a checkpoint becomes, in llama.cpp's names: the reader's own table, read the other way."""

from collections.abc import Iterator
from dataclasses import dataclass

from atomcli.checkpoint.gguf_names import BLOCK, OUTER, place_tensors
from atomcli.errors import UnsupportedError
from atomcli.integrations.reading import Reading
from atomcli.models.tensors import outer_tensors

_MIXTURE = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name, the tensors on disk that it stacks, and heads > 0 where rows are interleaved.

    block: None outside the blocks.
    """

    name: str
    disk: tuple[str, ...]
    heads: int
    block: int | None

    @property
    def stacked(self) -> bool:
        """Whether it holds the same matrix of every expert."""
        return "_exps." in self.name


def entries(reading: Reading) -> list[Entry]:
    """Every tensor of a model, in the order of the file; UnsupportedError names one that llama.cpp has no name for."""
    config = reading.config
    # What the file calls llama is read as a dense Llama or, with experts, as a Mixtral.
    model_type = "llama" if config.model_type == "mistral" else config.model_type
    experts = reading.family.expert_count(config, 0)

    def find(candidates: Iterator[str], present: set[str], block: int | None) -> Iterator[Entry]:
        left = set(present)
        for candidate in candidates:
            placed = place_tensors(
                [candidate], model_type, config.num_attention_heads, config.num_key_value_heads, experts
            )
            if placed and placed.keys() <= present:
                left -= placed.keys()
                yield Entry(candidate, tuple(placed), next(iter(placed.values())).heads, block)
        if left:
            raise UnsupportedError(f"GGUF has no name for the tensor {min(left)} of a {config.model_type} model")

    outer = set(outer_tensors(reading.family, config).values())
    found = list(find((f"{part}.weight" for part in OUTER), outer, None))
    for index in range(reading.blocks):
        parts = [*BLOCK, *(_MIXTURE if experts else ())]
        candidates = (f"blk.{index}.{part}.{kind}" for part in parts for kind in ("weight", "bias"))
        found += find(candidates, set(reading.disk_names(index).values()), index)
    return found
