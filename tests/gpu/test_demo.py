"""The demo model, quantized, says on the kernels what it says on the reference: 512 tokens, at every batch size.

Thirty blocks of 4- and 8-bit codes amplify a rounding: one bit of bfloat16 in the embedding moves the reference's own
logits by 6 to 7 %. So both are measured against the reference in fp32, which rounds nothing but the codes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atomcli.algorithms.rounding import round_to_nearest
from atomcli.checkpoint.source import Source, open_source
from atomcli.errors import RunError
from atomcli.formats.scheme import SCHEMES, KVFormat
from atomcli.kernels import attention, dispatch
from atomcli.models.registry import describe
from atomcli.runtime import decoder
from atomcli.runtime.decoding import DecodeRows, ladder
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.linear import QuantLinear, input_layout
from atomcli.runtime.pages import Pages
from atomcli.runtime.prompts import Piece, PromptRows
from tests.helpers.fused import fused_logits
from tests.helpers.tiny import random_layout_tensors

pytestmark = pytest.mark.gpu

ROWS, PROMPT, NEW = 128, 64, 512
CHECKED = 4  # rows of a batch that the reference reads
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache() -> None:
    """Takes the place of the cache that other tests isolate themselves in."""


@pytest.fixture(scope="module")
def source() -> Source:
    """From the user's own cache."""
    try:
        return open_source("demo")
    except RunError as error:
        pytest.skip(f"the demo model can't be fetched: {error}")


def blocks(source: Source, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The model's blocks on the card, in W4A8 with outliers and Hadamard, rounded to nearest, over a 4-bit cache."""
    scheme, family = SCHEMES["w4a8"], describe(source.config)
    for index in range(source.config.num_hidden_layers):
        block: Any = decoder.read_block(family, index, source, KVFormat("int4", hadamard=True)).to(DEVICE)
        for number, site in enumerate(family.sites(source.config, index)):
            for name in site.of_expert(0):
                linear = block.get_submodule(name)
                permutation, signs = random_layout_tensors(scheme, linear.in_features, number)
                assert signs is not None
                layout = input_layout(scheme, linear.in_features, permutation.to(DEVICE), signs.to(DEVICE))
                energies = torch.ones(linear.in_features, device=DEVICE)
                weight = round_to_nearest(layout.apply(linear.weight.float()), energies, scheme, 1.0)
                decoder.quantize_linear(block, name, QuantLinear.from_weight(weight, layout, linear.bias))
        yield block.to(dtype)


def loaded(source: Source, dtype: torch.dtype = torch.bfloat16) -> FusedModel:
    """The model in the fused runtime, the same codes in every dtype."""
    outer = decoder.read_outer(describe(source.config), source).to(DEVICE, dtype)
    return FusedModel(outer, blocks(source, dtype), PROMPT + NEW + 64)


def on_the_reference(source: Source, dtype: torch.dtype, patch: pytest.MonkeyPatch) -> FusedModel:
    """The model with products by the reference."""
    with patch.context() as inner:
        inner.setattr(dispatch, "choose", lambda *_: dispatch.Choice(None, "the test wants the reference"))
        model = loaded(source, dtype)
    assert set(model.kernels) == {"reference"}
    return model


def prompts(source: Source) -> torch.Tensor:
    """(ROWS, PROMPT) tokens of the manual."""
    manual = "".join(path.read_text() for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
    ids = source.tokenizer()(manual, verbose=False)["input_ids"]
    return torch.tensor(ids[: ROWS * PROMPT]).view(ROWS, PROMPT)


def without_kernels(model: FusedModel, tokens: torch.Tensor, patch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits fp32 (rows, NEW, vocabulary) of the tokens after the prompt."""
    with patch.context() as inner:
        inner.setattr(attention, "why_not", lambda *_: "the test wants the reference")
        return fused_logits(model, tokens, (tokens.shape[1],))[:, PROMPT - 1 :].float()


def difference(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Relative error of each token's logits."""
    return (logits - truth).norm(dim=-1) / truth.norm(dim=-1)


def shortfall(chosen: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """By how much the logit of each chosen token is below the largest."""
    return truth.amax(-1) - truth.gather(-1, chosen[..., None])[..., 0]


@torch.inference_mode()
def test_tokens_are_those_of_the_reference(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, reference = (on_the_reference(source, dtype, monkeypatch) for dtype in (torch.float32, torch.bfloat16))
    model = loaded(source)
    assert model.capturable
    asked = prompts(source)
    width = -(-(PROMPT + NEW) // model.format.page)
    pages, pools = Pages(ROWS * width, model.format.page), model.new_pools(ROWS * width)
    held: list[list[int]] = [[] for _ in range(ROWS)]
    for row in held:
        pages.extend(row, PROMPT + NEW)
    prefill, rows = PromptRows(model, pools, width), DecodeRows(model, pools, ROWS, width)
    for size in sorted(ladder(ROWS), reverse=True):
        first = torch.cat(
            [
                prefill.logits(
                    [Piece(asked[i].tolist(), 0, held[i]) for i in range(begin, min(begin + 8, size))]
                ).float()  # a copy: the next pass writes where this one's logits lie
                for begin in range(0, size, 8)
            ]
        )
        pending = first.argmax(-1).tolist()
        for row in range(size):
            rows.place(row, pending[row], PROMPT, held[row])
        produced, logits = [pending], [first[:CHECKED]]
        for _ in range(NEW - 1):
            produced.append(rows.step(size))
            assert rows.logits is not None
            logits.append(rows.logits[:CHECKED].float())
        new = torch.tensor(produced).T[:CHECKED]
        whole = torch.cat([asked[: len(new)], new[:, :-1]], dim=1)
        truth, rounded = (without_kernels(each, whole, monkeypatch) for each in (exact, reference))
        ours = torch.stack(logits, dim=1)
        assert torch.equal(ours.argmax(-1), new.to(ours.device))
        errors = [difference(each, truth) for each in (ours, rounded)]
        shorts = [shortfall(each.argmax(-1), truth) for each in (ours, rounded)]
        agreed = [(short == 0).float().mean() for short in shorts]
        print(
            f"batch {size}: kernels and reference in bf16 against fp32: error {errors[0].median():.4f} "
            f"{errors[1].median():.4f}, at most {errors[0].max():.3f} {errors[1].max():.3f}; "
            f"tokens equal {agreed[0]:.4f} {agreed[1]:.4f}; others short by {shorts[0].max():.3f} "
            f"{shorts[1].max():.3f} at most"
        )
        assert errors[0].median() < 1.15 * errors[1].median()
        assert errors[0][:, 0].median() < 2 * errors[1].median()  # what the prompt's pass says
        assert agreed[0] > agreed[1] - 0.01
        # Another token is one that bf16 might have chosen; a few that are far decide this mean, on either side.
        assert shorts[0].mean() < 3 * shorts[1].mean() + 5e-3
