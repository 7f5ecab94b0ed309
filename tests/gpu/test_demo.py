"""The demo model, quantized, says on the kernels what it says on the reference: 512 tokens, at every batch size."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from atomcli.checkpoint.source import open_source
from atomcli.errors import RunError
from atomcli.formats.scheme import SCHEMES, KVFormat
from atomcli.kernels import attention, dispatch
from atomcli.runtime import decoder
from atomcli.runtime.decoding import DecodeRows, ladder
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.pages import Pages
from atomcli.runtime.prompts import Piece, PromptRows
from tests.helpers.fused import fused_logits
from tests.helpers.tiny import write_checkpoint

pytestmark = pytest.mark.gpu

ROWS, PROMPT, NEW = 128, 64, 512
CHECKED = 4  # rows of a batch that the reference reads


@pytest.fixture(autouse=True)
def cache() -> None:
    """Takes the place of the cache that other tests isolate themselves in."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W4A8 with outliers and Hadamard, rounded to nearest, over a 4-bit cache."""
    try:
        source = open_source("demo")
    except RunError as error:
        pytest.skip(f"the demo model can't be fetched: {error}")
    directory = tmp_path_factory.mktemp("demo") / "w4a8"
    write_checkpoint(directory, source, SCHEMES["w4a8"], KVFormat("int4", hadamard=True))
    return directory


@pytest.fixture
def reference(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FusedModel]:
    """The same model on the card without our kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose", lambda *_: dispatch.Choice(None, "the test wants the reference"))
        yield FusedModel.of(decoder.load_checkpoint(checkpoint).cuda(), PROMPT + NEW + 64)


def prompts() -> torch.Tensor:
    """(ROWS, PROMPT) tokens of the manual."""
    manual = "".join(path.read_text() for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
    ids = open_source("demo").tokenizer()(manual, verbose=False)["input_ids"]
    return torch.tensor(ids[: ROWS * PROMPT]).view(ROWS, PROMPT)


def without_kernels(model: FusedModel, tokens: torch.Tensor, patch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits fp32 (rows, NEW, vocabulary) of the tokens after the prompt."""
    with patch.context() as inner:
        inner.setattr(attention, "why_not", lambda *_: "the test wants the reference")
        return fused_logits(model, tokens, (tokens.shape[1],))[:, PROMPT - 1 :].float()


@torch.inference_mode()
def test_tokens_are_those_of_the_reference(
    checkpoint: Path, reference: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FusedModel.of(decoder.load_checkpoint(checkpoint).cuda(), PROMPT + NEW + 64)
    assert model.capturable
    asked = prompts()
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
