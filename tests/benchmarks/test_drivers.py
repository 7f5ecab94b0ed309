"""What the drivers of peers do to a model before it is scored."""

import pytest
import torch
from torch import Tensor, nn

from atomcli.benchmarks.drivers.run import dense


class Packed(nn.Module):
    """A linear that unpacks its weight at each call."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.in_features = 6
        self.register_buffer("qweight", torch.randint(-8, 8, (4, 6), dtype=torch.int8))
        self.bias = torch.ones(4) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.float() / 16).T


class Model(nn.Module):
    dtype = torch.float32

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Packed(bias), nn.ReLU()])
        self.head = nn.Linear(4, 2)


def test_packed_linears_become_linears_of_the_same_weight() -> None:
    model = Model()
    packed, head = model.inner[0], model.head
    found = dense(model, "qweight")
    linear = found.inner[0]
    assert isinstance(linear, nn.Linear)
    assert torch.equal(linear.weight, packed.qweight.float() / 16)
    assert found.head is head
    x = torch.randn(3, 6)
    torch.testing.assert_close(linear(x), packed(x))


def test_a_bias_would_be_taken_for_a_weight() -> None:
    with pytest.raises(ValueError, match=r"inner\.0 has a bias"):
        dense(Model(bias=True), "qweight")
