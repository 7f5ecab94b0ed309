"""Perplexities against closed forms, against whole-logits arithmetic, and against lm-eval itself."""

import math
import re
from typing import Any

import pytest
import torch

from atomcli.errors import InputError, RunError, UnsupportedError
from atomcli.evaluation import scoring
from atomcli.evaluation.divergence import divergence, record
from atomcli.evaluation.perplexity import rolling_windows, token_perplexity, word_perplexity
from atomcli.text import Text


def windows(count: int = 3, length: int = 32, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(5))


def words(count: int, seed: int = 3) -> Text:
    indices = torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Text("words", " ".join(f"w{index}" for index in indices))


def test_a_model_that_knows_nothing_has_its_vocabulary_as_perplexity(model_maker: Any) -> None:
    model = model_maker()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = token_perplexity(model, windows())
    assert result.value == pytest.approx(97, rel=1e-6)
    assert result.standard_error == pytest.approx(0, abs=1e-4)
    assert (result.windows, result.window_length, result.scored_tokens) == (3, 32, 3 * 31)


def test_equals_whole_logits_arithmetic(tiny_model: Any) -> None:
    ids = windows()
    with torch.no_grad():
        logits = tiny_model(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    means = losses.double().mean(1)
    result = token_perplexity(tiny_model, ids, name="tiny")
    assert result.value == pytest.approx(math.exp(means.mean()), rel=1e-5)
    assert result.standard_error == pytest.approx(float(means.std() / math.sqrt(3) * means.mean().exp()), rel=1e-4)
    assert result.row()["token_perplexity"] == result.value
    assert "perplexity" not in result.row()  # never a bare perplexity


@pytest.mark.parametrize("rows", [1, 7, 31, 1000])
def test_chunks_of_logits_change_nothing(tiny_model: Any, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    ids = windows(1)
    whole = token_perplexity(tiny_model, ids).mean_nll
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", rows * 97)
    assert token_perplexity(tiny_model, ids).mean_nll == pytest.approx(whole, rel=1e-6)


def test_never_holds_a_window_of_logits(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 5 * 97)
    seen: list[int] = []
    hook = tiny_model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[0]))
    token_perplexity(tiny_model, windows())
    hook.remove()
    assert max(seen) == 5
    assert sum(seen) == 3 * 31


def test_one_window_has_no_error_and_progress_counts(tiny_model: Any) -> None:
    assert token_perplexity(tiny_model, windows(1)).standard_error is None
    calls: list[tuple[int, int]] = []
    token_perplexity(tiny_model, windows(2), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_refuses_what_it_cannot_score(tiny_model: Any, model_maker: Any) -> None:
    with pytest.raises(InputError, match="token 97, the model knows 97"):
        token_perplexity(tiny_model, torch.full((1, 4), 97))
    with pytest.raises(InputError, match="predict nothing"):
        token_perplexity(tiny_model, torch.zeros((0, 8), dtype=torch.int64))
    broken = model_maker()
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(RunError, match="NaN or Inf"):
        token_perplexity(broken, windows())
    capped = model_maker()
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(UnsupportedError, match="final_logit_softcapping"):
        token_perplexity(capped, windows())


@pytest.mark.parametrize("count", [10, 64, 100, 128])
def test_word_perplexity_is_lm_evals(tiny_model: Any, word_tokenizer: Any, count: int) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    text = words(count)
    harness = HFLM(pretrained=tiny_model, tokenizer=word_tokenizer, max_length=64)
    request = Instance("loglikelihood_rolling", {}, (text.content,), 0)
    log_likelihood = harness.loglikelihood_rolling([request], disable_tqdm=True)[0]
    result = word_perplexity(tiny_model, word_tokenizer, text, window=64)
    assert result.total_nll == pytest.approx(-log_likelihood, rel=1e-5)
    assert result.words == len(re.split(r"\s+", text.content))
    assert result.value == pytest.approx(math.exp(-log_likelihood / result.words), rel=1e-4)


def test_word_and_token_perplexity_differ_by_tokens_per_word(word_tokenizer: Any, model_maker: Any) -> None:
    """A model that knows nothing pays log V per token, so a text of n words and t tokens has V^(t/n) per word."""
    model = model_maker()
    torch.nn.init.zeros_(model.lm_head.weight)
    text = Text("spaced", "w1 w2\n\nw3  w4 ")  # white space at the end is a word of nothing to lm-eval: 5, not 4
    result = word_perplexity(model, word_tokenizer, text, window=16)
    assert (result.scored_tokens, result.words) == (4, 5)
    assert result.value == pytest.approx(97 ** (4 / 5), rel=1e-5)


def test_word_perplexity_of_the_first_windows_counts_only_their_words(tiny_model: Any, word_tokenizer: Any) -> None:
    text = words(100)
    start = Text("start", " ".join(text.content.split()[:32]))
    limited = word_perplexity(tiny_model, word_tokenizer, text, window=16, limit=2)
    whole = word_perplexity(tiny_model, word_tokenizer, start, window=16)
    assert limited.words == 32
    assert limited.value == pytest.approx(whole.value, rel=1e-6)


def test_rolling_windows_score_each_token_once() -> None:
    tokens = torch.arange(1, 24)
    pairs = rolling_windows(tokens, first=0, length=10)
    assert torch.equal(torch.cat([targets for _, targets in pairs]), tokens)
    for inputs, targets in pairs:
        assert len(inputs) == 10
        assert torch.equal(inputs[-len(targets) :] + 1, targets)  # each target from the token before it


def test_windows_longer_than_the_model_reads_are_refused(tiny_model: Any, word_tokenizer: Any) -> None:
    longer = torch.zeros(1, 257, dtype=torch.int64)
    for measure in (
        lambda: token_perplexity(tiny_model, longer),
        lambda: record(tiny_model, longer),
        lambda: divergence(record(tiny_model, longer[:, 1:]), tiny_model, longer),
        lambda: divergence(tiny_model, tiny_model, longer),
        lambda: word_perplexity(tiny_model, word_tokenizer, Text("text", "w1 w2 w3"), window=257),
    ):
        with pytest.raises(InputError):
            measure()
    with pytest.raises(InputError, match="257 tokens are longer than the 256"):
        token_perplexity(tiny_model, longer)
    assert token_perplexity(tiny_model, longer[:, 1:]).windows == 1
