"""The proof at the end: the files, read back, compute what the compress road computed.

A few short sequences run beside the calibration stream through the parent and through the quantized blocks. Their
divergence is the expected one; the written checkpoint is then opened again, block by block, and must reproduce it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.checkpoint.verify import verify_checkpoint
from atomcli.checkpoint.writer import shard_file
from atomcli.errors import RunError
from atomcli.formats.scheme import KVFormat, Scheme
from atomcli.models.tensors import block_name
from atomcli.pipeline.model import Walk
from atomcli.pipeline.progress import Progress
from atomcli.pipeline.stream import Stream, one_ahead, run
from atomcli.runtime.decoder import embed, empty_block, empty_model, logits, quantize_linear
from atomcli.runtime.linear import QuantLinear
from atomcli.runtime.saved import Plan

SEQUENCES = 2
TOKENS = 256
# Rows of logits that are compared at a time: vocabularies are large.
_ROWS = 64


@dataclass(frozen=True)
class Divergence:
    """KL(parent ‖ checkpoint) in nats, the mean over `tokens` tokens, and how often the top token is the same."""

    kld: float
    agreement: float
    tokens: int


def check_tokens(tokens: Tensor) -> Tensor:
    """The tokens that the proof runs on: the beginnings of the first calibration sequences."""
    return tokens[:SEQUENCES, :TOKENS]


def divergence(model: PreTrainedModel, parent: Stream, checkpoint: Stream, device: torch.device) -> Divergence:
    """The divergence of two streams after the last block; `model` has the final norm and the head."""
    total, agreeing, count = 0.0, 0, 0
    with torch.inference_mode():
        for ours, theirs in zip(checkpoint.chunks(1), parent.chunks(1), strict=True):
            for ours_rows, theirs_rows in zip(ours[0].split(_ROWS), theirs[0].split(_ROWS), strict=True):
                q = _log_probabilities(model, ours_rows.to(device))
                p = _log_probabilities(model, theirs_rows.to(device))
                total += float((p.exp() * (p - q)).sum())
                agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
                count += p.shape[0]
    if not total == total or total in (float("inf"), float("-inf")):
        raise RunError("The divergence of the checkpoint from its parent is not finite", "Nothing was published.")
    return Divergence(total / count, agreeing / count, count)


def verify(
    directory: Path,
    walk: Walk,
    tokens: Tensor,
    parent: Stream,
    road: Stream,
    expected: Divergence,
    progress: Progress,
) -> Divergence:
    """Open the finished files in `directory` again and run them; RunError when they don't compute what the road did.

    Every tensor is checked against the manifest, then the blocks are loaded one at a time as the run road loads them.
    On the CPU the hidden states after the last block must be equal bit for bit, and with them the logits.
    """
    verify_checkpoint(directory)
    config = AutoConfig.from_pretrained(directory)
    plan = Plan.of(config)
    outer = empty_model(walk.family, config)
    _load(
        outer,
        _shard(directory, None),
        tied=config.tie_word_embeddings,
    )
    outer.to(walk.device)
    before: list[Tensor] = []
    with torch.inference_mode():
        before = [embed(outer, sequence[None].to(walk.device)) for sequence in tokens]
        blocks = (
            reopened_block(directory, walk, index, plan.linears, plan.schemes, plan.cache_of(index))
            for index in range(walk.blocks)
        )
        for index, block in enumerate(one_ahead(blocks)):
            block.to(walk.device)
            before = [walk.forward(block, index, hidden) for hidden in before]
            progress.advance(index + 1)
    reopened = Stream(road.path.with_name("reopened.stream"), road.shape, road.dtype)
    reopened.write(iter(before), "the reopened checkpoint")
    try:
        found = divergence(outer, parent, reopened, walk.device)
        same = all(torch.equal(a, b) for a, b in zip(reopened.chunks(1), road.chunks(1), strict=True))
    finally:
        reopened.path.unlink(missing_ok=True)
    exact = walk.device.type == "cpu"
    if (exact and not (same and found == expected)) or abs(found.kld - expected.kld) > 1e-3 * max(expected.kld, 1e-3):
        raise RunError(
            f"The checkpoint read back from {directory} computes something else than what was compressed: "
            f"KLD {found.kld:.6g} instead of {expected.kld:.6g}",
            "It is not published. Check the disk and the memory of this machine, then run the same command again.",
        )
    return found


def advance(walk: Walk, block: nn.Module, index: int, before: Stream, after: Stream) -> None:
    """Run one block over a stream a sequence at a time, as the proof does; the caller syncs what comes out."""
    outputs: Iterator[Tensor] = run(before, 1, lambda chunk: walk.forward(block, index, chunk))
    after.write(outputs, block_name(index), sync=False)


def _log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return torch.log_softmax(logits(model, hidden).double(), dim=-1)


def reopened_block(
    directory: Path,
    walk: Walk,
    index: int,
    linears: Mapping[str, Mapping[str, Any]],
    schemes: Mapping[str, Scheme],
    kv: KVFormat,
) -> nn.Module:
    """A quantized block made of its shard, in the host's memory; `linears` are entries of quantization_config."""
    block = empty_block(walk.family, walk.config, index, kv)
    prefix = f"{block_name(index)}."
    entries = {name.removeprefix(prefix): entry for name, entry in linears.items() if name.startswith(prefix)}
    for name, entry in entries.items():
        block.set_submodule(name, QuantLinear.from_entry(entry, schemes, walk.source.dtype, "meta"))
    _load(block, {name.removeprefix(prefix): tensor for name, tensor in _shard(directory, index).items()})
    # Sites share their quantized input only after their tensors are there to be compared.
    for name in entries:
        module = block.get_submodule(name)
        assert isinstance(module, QuantLinear)
        quantize_linear(block, name, module)
    return block


def _shard(directory: Path, index: int | None) -> dict[str, Tensor]:
    file = TensorFile(directory / shard_file(index))
    return {name: file.read(name).clone() for name in file.entries}


def _load(module: nn.Module, tensors: dict[str, Tensor], tied: bool = False) -> None:
    expected = set(module.state_dict())
    if tied:
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    wrong = sorted(expected ^ set(tensors))
    if wrong:
        raise RunError(f"The finished checkpoint lacks {wrong[0]}, or has no place for it", "It is not published.")
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)
