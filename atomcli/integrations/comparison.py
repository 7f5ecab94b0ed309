"""What a trade costs: a checkpoint and its export run over the same text side by side, one block of each at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from atomcli.integrations.reading import Reading
from atomcli.runtime.decoder import block_arguments, embed, empty_model, logits, read_block

if TYPE_CHECKING:
    from atomcli.checkpoint.source import Source

# Rows of logits that are compared at a time: vocabularies are large.
_ROWS = 64


@dataclass(frozen=True)
class Cost:
    """Mean KL divergences in nats over `tokens` tokens; those to the parent are None where none was given."""

    tokens: int
    export_from_checkpoint: float
    checkpoint_from_parent: float | None
    export_from_parent: float | None


class Comparison:
    """Hidden states of the same windows (n, length) in the checkpoint, its export and, if one is given, the parent."""

    def __init__(self, reading: Reading, windows: Tensor, parent: "Source | None" = None) -> None:
        self.reading, self.parent = reading, parent
        self.frame = empty_model(reading.family, reading.config)
        outer = reading.outer()
        if reading.config.tie_word_embeddings:
            outer["lm_head.weight"] = outer["model.embed_tokens.weight"]
        self.frame.load_state_dict(outer, strict=True, assign=True)
        self.frame.requires_grad_(False)
        with torch.inference_mode():
            start = [embed(self.frame, window[None]) for window in windows]
        names = ["checkpoint", "export", *(["parent"] if parent is not None else [])]
        self.hidden = {name: list(start) for name in names}

    def advance(self, index: int, export: nn.Module) -> None:
        """Run block `index` of all of them; `export` is the export's."""
        blocks = {"checkpoint": self.reading.block(index), "export": export}
        if self.parent is not None:
            blocks["parent"] = read_block(self.reading.family, index, self.parent)
        with torch.inference_mode():
            for name, block in blocks.items():
                self.hidden[name] = [self._forward(block, index, window) for window in self.hidden[name]]

    def _forward(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        output = block(hidden, **block_arguments(self.frame, self.reading.family, index, hidden))
        return output[0] if isinstance(output, tuple) else output

    def cost(self) -> Cost:
        """The divergences after the last block."""
        tokens = sum(window.shape[1] for window in self.hidden["checkpoint"])
        pairs = {"export_from_checkpoint": ("checkpoint", "export")}
        if self.parent is not None:
            pairs |= {f"{name}_from_parent": ("parent", name) for name in ("checkpoint", "export")}
        found: Mapping[str, float] = {key: self._divergence(*names) / tokens for key, names in pairs.items()}
        return Cost(
            tokens,
            found["export_from_checkpoint"],
            found.get("checkpoint_from_parent"),
            found.get("export_from_parent"),
        )

    @torch.inference_mode()
    def _divergence(self, reference: str, other: str) -> float:
        """KL(reference ‖ other) in nats, summed over all tokens."""
        total = 0.0
        for first, second in zip(self.hidden[reference], self.hidden[other], strict=True):
            for p_rows, q_rows in zip(first[0].split(_ROWS), second[0].split(_ROWS), strict=True):
                p = logits(self.frame, p_rows).double().log_softmax(-1)
                q = logits(self.frame, q_rows).double().log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
        return total
