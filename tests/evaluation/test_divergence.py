"""Divergence against closed forms and whole-logits arithmetic."""

import math
from typing import Any

import pytest
import torch

from atomcli.errors import InputError
from atomcli.evaluation import scoring
from atomcli.evaluation.divergence import divergence, record
from atomcli.evaluation.perplexity import token_perplexity


def windows(count: int = 3, length: int = 32) -> torch.Tensor:
    return torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(7))


def test_a_model_does_not_diverge_from_itself(tiny_model: Any) -> None:
    result = divergence(tiny_model, tiny_model, windows())
    assert result.mean_kld == pytest.approx(0, abs=1e-7)
    assert result.kld_99 == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1.0
    assert result.perplexity_ratio == 1.0
    assert result.perplexity_ratio_standard_error == 0.0


def test_equals_whole_logits_arithmetic_and_is_not_symmetric(tiny_model: Any, other_model: Any) -> None:
    ids = windows()
    with torch.no_grad():
        p = tiny_model(ids).logits[:, :-1].double().log_softmax(-1)
        q = other_model(ids).logits[:, :-1].double().log_softmax(-1)
    kld = (p.exp() * (p - q)).sum(-1)
    result = divergence(tiny_model, other_model, ids)
    assert result.mean_kld == pytest.approx(float(kld.mean()), rel=1e-5)
    assert result.mean_kld_standard_error == pytest.approx(float(kld.mean(1).std() / math.sqrt(3)), rel=1e-4)
    assert result.kld_95 == pytest.approx(float(kld.flatten().quantile(0.95)), rel=1e-4)
    assert result.kld_99 == pytest.approx(float(kld.flatten().quantile(0.99)), rel=1e-4)
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert divergence(other_model, tiny_model, ids).mean_kld != pytest.approx(result.mean_kld, rel=1e-3)


def test_scaled_logits_have_a_known_divergence(tiny_model: Any, model_maker: Any) -> None:
    """With logits z and c·z: KL = (1 − c) E_p[z] − log Z(1) + log Z(c); the most likely token stays the same."""
    scaled = model_maker()
    scaled.lm_head.weight.data *= 0.5
    ids = windows()
    with torch.no_grad():
        z = tiny_model(ids).logits[:, :-1].double()
    expected = (0.5 * (z.softmax(-1) * z).sum(-1) - z.logsumexp(-1) + (0.5 * z).logsumexp(-1)).mean()
    result = divergence(tiny_model, scaled, ids)
    assert result.mean_kld == pytest.approx(float(expected), rel=1e-5)
    assert result.mean_kld > 0.1
    assert result.top1_agreement == 1.0


def test_one_pass_gives_both_perplexities_and_their_paired_ratio(tiny_model: Any, other_model: Any) -> None:
    ids = windows()
    result = divergence(tiny_model, other_model, ids, parent_name="a", name="b")
    parent, checkpoint = token_perplexity(tiny_model, ids, "a"), token_perplexity(other_model, ids, "b")
    assert result.parent.value == pytest.approx(parent.value, rel=1e-6)
    assert result.checkpoint.value == pytest.approx(checkpoint.value, rel=1e-6)
    assert result.perplexity_ratio == pytest.approx(checkpoint.value / parent.value, rel=1e-6)
    assert result.row()["parent_token_perplexity"] == result.parent.value


def test_error_of_the_ratio_is_paired(tiny_model: Any, other_model: Any) -> None:
    """The error comes from differences window by window, not from two errors added up."""
    ids = windows(4)
    pairs = [divergence(tiny_model, other_model, window[None]) for window in ids]
    differences = torch.tensor([pair.checkpoint.mean_nll - pair.parent.mean_nll for pair in pairs]).double()
    result = divergence(tiny_model, other_model, ids)
    expected = result.perplexity_ratio * float(differences.std()) / math.sqrt(4)
    assert result.perplexity_ratio_standard_error == pytest.approx(expected, rel=1e-4)
    assert pairs[0].perplexity_ratio_standard_error is None


def test_a_recorded_parent_gives_the_same_numbers(tiny_model: Any, other_model: Any) -> None:
    ids = windows()
    recording = record(tiny_model, ids)
    assert divergence(recording, other_model, ids) == divergence(tiny_model, other_model, ids)
    with pytest.raises(InputError, match="other windows"):
        divergence(recording, other_model, ids.flip(0))


def test_chunks_change_nothing(tiny_model: Any, other_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = windows()
    whole = divergence(tiny_model, other_model, ids)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 7 * 97)
    chunked = divergence(tiny_model, other_model, ids)
    assert chunked.mean_kld == pytest.approx(whole.mean_kld, rel=1e-6)
    assert chunked.top1_agreement == whole.top1_agreement
    assert chunked.parent.value == pytest.approx(whole.parent.value, rel=1e-6)
    assert chunked.checkpoint.value == pytest.approx(whole.checkpoint.value, rel=1e-6)


def test_refuses_another_vocabulary(tiny_model: Any, model_maker: Any) -> None:
    with pytest.raises(InputError, match="The parent predicts 97 tokens, the checkpoint 101"):
        divergence(tiny_model, model_maker(vocabulary=101), windows())
