"""The start of a decode step: the kernel, on the emulator, does what torch does."""

import pytest
import torch

from atomcli.kernels.begin_decode import ENTRY, SOURCE, THREADS, _outputs, begin_decode
from tests.kernels.emulator import COMPILER, HostKernel


@pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
def test_the_kernel_does_what_torch_does() -> None:
    page, width = 16, 5
    lengths = torch.tensor([0, 1, 15, 16, 79], dtype=torch.int32)
    tokens = torch.tensor([3, 0, 6, 2, 2])
    table = torch.randperm(40, dtype=torch.int32)[: len(tokens) * width].view(len(tokens), width)
    cos, sin = torch.randn(2, 80, 32)
    embedding = torch.randn(7, 24).bfloat16()
    grown = lengths.clone()
    expected = begin_decode(tokens, grown, table, page, cos, sin, embedding)
    assert grown.tolist() == [0, 2, 16, 17, 80]
    assert expected.slots[0] < 0
    results = _outputs(tokens, cos, embedding)
    HostKernel(SOURCE, ENTRY, {}).launch(
        len(tokens), THREADS, tokens, lengths, table, cos, sin, embedding, *results, page, width, 32, 3
    )
    assert torch.equal(lengths, grown)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
