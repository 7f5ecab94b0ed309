"""How far a checkpoint's predictions are from its parent's: KL divergence per token, in nats, parent first.

Perplexity can stay the same while predictions change; the divergence can't. Both models see the same windows, and the
statistics are those of llama.cpp's `--kl-divergence`: mean with its error, tail percentiles, how often both models
would say the same token, and the ratio of the perplexities with its (paired) error.

No logits are kept. Either both models go through a window side by side, or `record` keeps the parent's last hidden
states (2 bytes × hidden size per token, hundreds of times less than its logits) so that the parent can be freed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atomcli.errors import InputError
from atomcli.evaluation.perplexity import TokenPerplexity, _exp, from_window_means
from atomcli.evaluation.scoring import (
    Progress,
    check_context,
    check_finite,
    check_windows,
    chunk_rows,
    final_hidden,
    head_of,
    logit_chunks,
    standard_error,
    vocabulary_of,
)


@dataclass(frozen=True)
class Recording:
    """What a model predicts on some windows: its head and its last hidden states, one (length, hidden) per window."""

    head: nn.Module
    hidden: Sequence[Tensor]
    windows: Tensor


@dataclass(frozen=True)
class Divergence:
    """KL(parent ‖ checkpoint) per token in nats, agreement of the most likely token, and both perplexities.

    Standard errors are over windows and None for a single window. The means of each window are kept, so that two
    checkpoints measured on the same windows can be compared window by window.
    """

    mean_kld: float
    mean_kld_standard_error: float | None
    kld_95: float
    kld_99: float
    top1_agreement: float
    top1_agreement_standard_error: float | None
    perplexity_ratio: float
    perplexity_ratio_standard_error: float | None
    parent: TokenPerplexity
    checkpoint: TokenPerplexity
    window_kld: tuple[float, ...]
    window_nll: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """The fields for a table or a JSON document, flat; the perplexities are token perplexities."""
        return {
            "name": self.checkpoint.name,
            "mean_kld": self.mean_kld,
            "mean_kld_standard_error": self.mean_kld_standard_error,
            "kld_95": self.kld_95,
            "kld_99": self.kld_99,
            "top1_agreement": self.top1_agreement,
            "top1_agreement_standard_error": self.top1_agreement_standard_error,
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_ratio_standard_error": self.perplexity_ratio_standard_error,
            "parent_token_perplexity": self.parent.value,
            "token_perplexity": self.checkpoint.value,
            "windows": self.checkpoint.windows,
            "window_length": self.checkpoint.window_length,
            "scored_tokens": self.checkpoint.scored_tokens,
        }


def record(model: Any, windows: Tensor, progress: Progress | None = None) -> Recording:
    """The model's predictions on windows (n, length), small enough to keep while another model is loaded."""
    head = head_of(model)
    check_windows(windows, vocabulary_of(head))
    check_context(model, windows.shape[1])
    hidden = []
    for index, window in enumerate(windows):
        hidden.append(final_hidden(model, window).cpu())
        if progress is not None:
            progress(index + 1, len(windows))
    return Recording(head, hidden, windows)


def divergence(
    parent: Any,
    checkpoint: Any,
    windows: Tensor,
    parent_name: str = "parent",
    name: str = "checkpoint",
    progress: Progress | None = None,
) -> Divergence:
    """Divergence of a checkpoint from its parent (a causal LM, or its `Recording` on the same windows).

    windows: token ids (n, length); of each window the last length − 1 tokens are scored, as in token perplexity.
    Raises InputError when the two differ in vocabulary or the recording is of other windows.
    """
    parent_head = parent.head if isinstance(parent, Recording) else head_of(parent)
    head = head_of(checkpoint)
    vocabulary = vocabulary_of(head)
    if vocabulary_of(parent_head) != vocabulary:
        raise InputError(
            f"The parent predicts {vocabulary_of(parent_head)} tokens, the checkpoint {vocabulary}",
            "Compare a checkpoint with the model that it was made from",
        )
    if isinstance(parent, Recording) and not torch.equal(parent.windows, windows):
        raise InputError("The parent was recorded on other windows than the checkpoint is measured on")
    check_windows(windows, vocabulary)
    for model in (parent, checkpoint):
        if not isinstance(model, Recording):
            check_context(model, windows.shape[1])
    scores = []
    for index, window in enumerate(windows):
        parent_hidden = parent.hidden[index] if isinstance(parent, Recording) else final_hidden(parent, window)
        scores.append(
            _compare(parent_head, parent_hidden[:-1], head, final_hidden(checkpoint, window)[:-1], window[1:])
        )
        if progress is not None:
            progress(index + 1, len(windows))
    kld, agree, parent_nll, nll = (torch.stack(column) for column in zip(*scores, strict=True))  # each (n, length − 1)
    return _summarise(kld, agree, parent_nll, nll, windows.shape[1], parent_name, name)


def kl_divergence(parent_log_p: Tensor, log_p: Tensor) -> Tensor:
    """KL(parent ‖ other) in nats of log-probabilities (..., vocabulary) → (...)."""
    return nn.functional.kl_div(log_p, parent_log_p, reduction="none", log_target=True).sum(-1)


@torch.inference_mode()
def _compare(
    parent_head: nn.Module, parent_hidden: Tensor, head: nn.Module, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token of one window, fp64 on the CPU: KL, 1 where the top tokens agree, −log p of parent and checkpoint."""
    rows = chunk_rows(vocabulary_of(head))
    device = head.weight.device
    targets = targets.to(device)  # type: ignore[arg-type]
    parent_hidden = parent_hidden.to(parent_head.weight.device)  # type: ignore[arg-type]
    parts = []
    for index, (parent_logits, logits) in enumerate(_paired(parent_head, parent_hidden, head, hidden, rows)):
        parent_log_p = parent_logits.to(logits.device).log_softmax(-1)
        log_p = logits.log_softmax(-1)
        wanted = targets[index * rows : (index + 1) * rows, None]
        parts.append(
            torch.stack(
                [
                    kl_divergence(parent_log_p, log_p),
                    (parent_log_p.argmax(-1) == log_p.argmax(-1)).float(),
                    -parent_log_p.gather(-1, wanted)[:, 0],
                    -log_p.gather(-1, wanted)[:, 0],
                ]
            )
        )
    kld, agree, parent_nll, nll = torch.cat(parts, dim=1).double().cpu()
    return kld, agree, parent_nll, nll


def _paired(
    parent_head: nn.Module, parent_hidden: Tensor, head: nn.Module, hidden: Tensor, rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(logit_chunks(parent_head, parent_hidden, rows), logit_chunks(head, hidden, rows), strict=True)


def _summarise(
    kld: Tensor, agree: Tensor, parent_nll: Tensor, nll: Tensor, length: int, parent_name: str, name: str
) -> Divergence:
    """Statistics of per-token scores, each fp64 (windows, length − 1)."""
    mean_kld = check_finite(float(kld.mean()), "the mean KL divergence")
    percentiles = torch.quantile(kld.flatten(), torch.tensor([0.95, 0.99], dtype=kld.dtype))
    parent = from_window_means(parent_nll.mean(1).tolist(), length, parent_name)
    checkpoint = from_window_means(nll.mean(1).tolist(), length, name)
    # Windows differ in difficulty far more than the two models do: the error of the ratio is that of the
    # differences, window by window.
    ratio = _exp(checkpoint.mean_nll - parent.mean_nll)
    ratio_error = standard_error((nll - parent_nll).mean(1))
    return Divergence(
        mean_kld=mean_kld,
        mean_kld_standard_error=standard_error(kld.mean(1)),
        kld_95=float(percentiles[0]),
        kld_99=float(percentiles[1]),
        top1_agreement=float(agree.mean()),
        top1_agreement_standard_error=standard_error(agree.mean(1)),
        perplexity_ratio=ratio,
        perplexity_ratio_standard_error=None if ratio_error is None else ratio * ratio_error,
        parent=parent,
        checkpoint=checkpoint,
        window_kld=tuple(kld.mean(1).tolist()),
        window_nll=tuple(nll.mean(1).tolist()),
    )
