"""Perplexity in two conventions that must never be mixed up, each with its name in the result.

*Token perplexity* (GPTQ, QuaRot, Atom and their tables): the text is joined and tokenised once, cut into windows
of 2048 that do not overlap, the tail is dropped; each window scores its last 2047 tokens. Llama-2-7B has 5.47 on
WikiText-2.

*Word perplexity* (lm-evaluation-harness): every token is scored, the first of a window from the last token of the
window before, and the sum is divided by the number of words, not of tokens. Llama-2-7B has 8.79 on WikiText-2.
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from atomcli.errors import InputError
from atomcli.evaluation.scoring import (
    Progress,
    check_context,
    check_finite,
    check_windows,
    final_hidden,
    head_of,
    negative_log_likelihoods,
    standard_error,
    vocabulary_of,
)
from atomcli.text import Text, tokenize


@dataclass(frozen=True)
class TokenPerplexity:
    """exp(mean −log p) over all scored tokens of all windows; `standard_error` is over windows, None for one."""

    value: float
    standard_error: float | None
    mean_nll: float
    windows: int
    window_length: int
    scored_tokens: int
    name: str = ""

    def row(self) -> dict[str, Any]:
        """The fields for a table or a JSON document; the number is called what it is."""
        fields = asdict(self)
        return {
            "name": fields.pop("name"),
            "token_perplexity": fields.pop("value"),
            **fields,
            "convention": f"joined text, non-overlapping windows of {self.window_length}, tail dropped",
        }


@dataclass(frozen=True)
class WordPerplexity:
    """exp(sum of −log p over all tokens / number of words), words as lm-evaluation-harness counts them."""

    value: float
    total_nll: float
    words: int
    scored_tokens: int
    window_length: int
    name: str = ""

    def row(self) -> dict[str, Any]:
        """The fields for a table or a JSON document; the number is called what it is."""
        fields = asdict(self)
        return {
            "name": fields.pop("name"),
            "word_perplexity": fields.pop("value"),
            **fields,
            "convention": f"lm-eval: rolling windows of {self.window_length}, every token scored, divided by words",
        }


def token_perplexity(model: Any, windows: Tensor, name: str = "", progress: Progress | None = None) -> TokenPerplexity:
    """Token perplexity of a causal LM over windows (n, length) of token ids; `progress` is called after each window."""
    head = head_of(model)
    check_windows(windows, vocabulary_of(head))
    check_context(model, windows.shape[1])
    means = []
    for index, window in enumerate(windows):
        hidden = final_hidden(model, window)
        means.append(float(negative_log_likelihoods(head, hidden[:-1], window[1:]).mean()))
        if progress is not None:
            progress(index + 1, len(windows))
    return from_window_means(means, windows.shape[1], name)


def from_window_means(means: list[float], window_length: int, name: str = "") -> TokenPerplexity:
    """Token perplexity from each window's mean −log p; the error of the mean is carried through exp to first order."""
    mean = check_finite(sum(means) / len(means), "the mean negative log-likelihood")
    value = _exp(mean)
    error = standard_error(means)
    return TokenPerplexity(
        value=value,
        standard_error=None if error is None else value * error,
        mean_nll=mean,
        windows=len(means),
        window_length=window_length,
        scored_tokens=len(means) * (window_length - 1),
        name=name,
    )


def word_perplexity(
    model: Any,
    tokenizer: Any,
    text: Text,
    window: int = 2048,
    limit: int | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> WordPerplexity:
    """Word perplexity of a text taken as one document, or of its first `limit` windows of tokens.

    Agrees with lm_eval's `loglikelihood_rolling` and its count of words on the same document (lm_eval's own wikitext
    task scores page by page after detokenising: for that number run the task). Raises InputError for an empty text.
    """
    head = head_of(model)
    check_context(model, window)
    tokens, words = _tokens_and_words(text, tokenizer, window * limit if limit else None)
    check_windows(torch.stack([tokens.max(), tokens.min()])[None], vocabulary_of(head))
    pairs = rolling_windows(tokens, _first_token(tokenizer), window)
    total = 0.0
    for index, (inputs, targets) in enumerate(pairs):
        hidden = final_hidden(model, inputs)[-len(targets) :]
        total += float(negative_log_likelihoods(head, hidden, targets).sum())
        if progress is not None:
            progress(index + 1, len(pairs))
    check_finite(total, "the negative log-likelihood of the text")
    return WordPerplexity(_exp(total / words), total, words, len(tokens), window, name)


def rolling_windows(tokens: Tensor, first: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) pairs that score each token once; the last window reaches back for a full context."""
    padded = torch.cat([torch.tensor([first], dtype=tokens.dtype), tokens])  # padded[i] predicts tokens[i]
    ends = [min(start + length, len(tokens)) for start in range(0, len(tokens), length)]
    starts = range(0, len(tokens), length)
    return [(padded[max(0, end - length) : end], tokens[start:end]) for start, end in zip(starts, ends, strict=True)]


def _tokens_and_words(text: Text, tokenizer: Any, limit: int | None) -> tuple[Tensor, int]:
    """Tokens (n,), and the words they cover: pieces between white space, as lm_eval counts them."""
    tokens = tokenize(text, tokenizer)
    content = text.content
    if limit is not None and len(tokens) > limit:
        offsets = tokenizer(content, verbose=False, return_offsets_mapping=True)["offset_mapping"]
        content = content[: offsets[limit - 1][1]]
        tokens = tokens[:limit]
    return tokens, len(re.split(r"\s+", content))


def _first_token(tokenizer: Any) -> int:
    """What the very first token is predicted from: BOS, else EOS, as lm_eval does."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("The tokenizer has neither a BOS nor an EOS token to predict a text's first token from")


def _exp(nats: float) -> float:
    """exp, with infinity where a double ends: a broken model is reported as broken, not as an OverflowError."""
    return math.exp(nats) if nats < 700 else math.inf
