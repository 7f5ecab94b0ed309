"""One window through a model without ever holding its logits: hidden states once, logits a few rows at a time.

A window of 2048 tokens and a vocabulary of 150,000 make 1.2 GB of fp32 logits; the hidden states they come from are
a few MB. The head is applied to as many rows at once as CHUNK_LOGITS allows, and each chunk is reduced on the spot.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atomcli.errors import InputError, RunError, UnsupportedError

# 64 MB of fp32 logits; log_softmax and its input are alive together, for two models at most.
CHUNK_LOGITS = 16 * 2**20

Progress = Callable[[int, int], None]

# Configs that change the logits after the head; none of the supported families does.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@torch.inference_mode()
def final_hidden(model: Any, window: Tensor) -> Tensor:
    """Hidden states after the last norm, (tokens, hidden) in the model's dtype, for one window (tokens,) of ids."""
    output = model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    return output.last_hidden_state[0]


def head_of(model: Any) -> nn.Module:
    """The module that turns hidden states into logits; UnsupportedError where logits are more than that."""
    for name in LOGIT_TRANSFORMS:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UnsupportedError(f"{type(model).__name__} sets {name}; atom eval reads logits straight from the head")
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedError(f"{type(model).__name__} has no output head; atom eval needs a causal language model")
    return head


def vocabulary_of(head: nn.Module) -> int:
    """Number of logits per token."""
    return int(head.weight.shape[0])  # type: ignore[union-attr,index]


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits to hold at once."""
    return max(1, CHUNK_LOGITS // vocabulary)


def logit_chunks(head: nn.Module, hidden: Tensor, rows: int) -> Iterator[Tensor]:
    """fp32 logits (at most `rows`, vocabulary) of hidden (tokens, hidden), from the front."""
    for start in range(0, hidden.shape[0], rows):
        yield head(hidden[start : start + rows]).float()


@torch.inference_mode()
def negative_log_likelihoods(head: nn.Module, hidden: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """−log p(target) in nats, fp64 (tokens,) on the CPU; hidden (tokens, hidden), targets (tokens,) aligned to it."""
    rows = rows or chunk_rows(vocabulary_of(head))
    targets = targets.to(hidden.device)
    losses = [
        nn.functional.cross_entropy(logits, targets[index * rows : (index + 1) * rows], reduction="none")
        for index, logits in enumerate(logit_chunks(head, hidden, rows))
    ]
    return torch.cat(losses).double().cpu()


def check_windows(windows: Tensor, vocabulary: int) -> None:
    """InputError when windows (n, length) hold no target or a token the model has no embedding for."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"Windows of shape {tuple(windows.shape)} predict nothing; (n ≥ 1, length ≥ 2) is needed")
    highest = int(windows.max())
    if highest >= vocabulary:
        raise InputError(
            f"The text has token {highest}, the model knows {vocabulary} tokens",
            "Use the tokenizer that belongs to the model",
        )


def check_context(model: Any, length: int) -> None:
    """InputError when windows of `length` tokens are longer than what the model was made for."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise InputError(
            f"Windows of {length} tokens are longer than the {context} that the model reads",
            f"Give --window-length {context} or less",
        )


def check_finite(value: float, what: str) -> float:
    """`value`, or RunError when the model put out NaN or Inf somewhere on the way to it."""
    if not math.isfinite(value):
        raise RunError(f"{what} is {value}: the model puts out NaN or Inf on this text")
    return value


def standard_error(values: Sequence[float] | Tensor) -> float | None:
    """Standard error of the mean of independent values; None for fewer than two.

    The values are means over windows, not over tokens: tokens of one window share their context, and an error from
    tokens would come out too small.
    """
    samples = torch.as_tensor(values, dtype=torch.float64)
    if len(samples) < 2:
        return None
    return float(samples.std(correction=1) / math.sqrt(len(samples)))
