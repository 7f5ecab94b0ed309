"""The demo model, quantized, says on the kernels what it says on the reference: 512 tokens, at every batch size."""

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


def blocks(source: Source) -> Iterator[nn.Module]:
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
        yield block


def loaded(source: Source) -> FusedModel:
    """The model in the fused runtime."""
    outer = decoder.read_outer(describe(source.config), source).to(DEVICE)
    return FusedModel(outer, blocks(source), PROMPT + NEW + 64)


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


@torch.inference_mode()
def test_tokens_are_those_of_the_reference(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose", lambda *_: dispatch.Choice(None, "the test wants the reference"))
        reference = loaded(source)
    model = loaded(source)
    assert set(reference.kernels) == {"reference"}
    assert model.capturable
    asked = prompts(source)
    width = -(-(PROMPT + NEW) // model.format.page)
    pages, pools = Pages(ROWS * width, model.format.page), model.new_pools(ROWS * width)
    held: list[list[int]] = [[] for _ in range(ROWS)]
    for row in held:
        pages.extend(row, PROMPT + NEW)
    prefill, rows = PromptRows(model, pools, width), DecodeRows(model, pools, ROWS, width)
    for size in sorted(ladder(ROWS), reverse=True):
        first = [
            prefill.logits([Piece(asked[i].tolist(), 0, held[i]) for i in range(begin, min(begin + 8, size))])
            for begin in range(0, size, 8)
        ]
        pending = torch.cat([logits.argmax(-1) for logits in first]).tolist()
        for row in range(size):
            rows.place(row, pending[row], PROMPT, held[row])
        produced, logits = [pending], [torch.cat(first)[:CHECKED].float()]
        for _ in range(NEW - 1):
            produced.append(rows.step(size))
            assert rows.logits is not None
            logits.append(rows.logits[:CHECKED].float())
        new = torch.tensor(produced).T[:CHECKED]
        whole = torch.cat([asked[: len(new)], new[:, :-1]], dim=1)
        expected = without_kernels(reference, whole, monkeypatch)
        ours = torch.stack(logits, dim=1)
        new = new.to(expected.device)
        error = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
        short = expected.amax(-1) - expected.gather(-1, new[..., None])[..., 0]
        agreed = (short == 0).float().mean()
        print(
            f"batch {size}: {agreed:.4f} of the tokens are the reference's; error of the logits {error.median():.4f}, "
            f"at most {error.max():.4f}; a token falls short by {short.max():.3f} at most"
        )
        assert error.median() < 3e-2
        assert agreed > 0.97
        # Another token is one that the reference finds about as likely.
        assert short.max() < 0.5
