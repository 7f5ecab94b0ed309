import pytest
import torch
from torch import nn

from atomcli.runtime import wide
from atomcli.runtime.wide import FEWEST_ROWS, WideLinear, widen


@pytest.fixture
def narrow_cpu(monkeypatch):
    """A CPU that multiplies fp32 alone."""
    monkeypatch.setattr(wide, "multiplies", lambda dtype: dtype == torch.float32)


def widened(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(48, 24, bias=bias, dtype=dtype).requires_grad_(False)
    widen(linear)
    return linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FEWEST_ROWS, 48), (3, 50, 48)])
def test_many_rows_are_summed_in_fp32_and_rounded_once(narrow_cpu, dtype, bias, shape):
    torch.manual_seed(0)
    linear, x = widened(dtype, bias), torch.randn(shape).to(dtype)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    y = linear(x)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 24)
    spacing = torch.finfo(dtype).eps
    assert torch.all((y.double() - exact).abs() <= spacing / 2 * exact.abs() + 1e-5)


def test_nothing_changes_where_it_would_not_help(narrow_cpu, monkeypatch):
    torch.manual_seed(0)
    few, many = torch.randn(FEWEST_ROWS - 1, 48).bfloat16(), torch.randn(FEWEST_ROWS, 48)
    assert torch.equal(
        widened_like(linear := nn.Linear(48, 24).bfloat16())(few), nn.functional.linear(few, linear.weight, linear.bias)
    )
    full = nn.Linear(48, 24)
    expected = full(many)
    assert torch.equal(widened_like(full)(many), expected)
    monkeypatch.setattr(wide, "multiplies", lambda dtype: True)
    assert torch.equal(linear(many.bfloat16()), nn.functional.linear(many.bfloat16(), linear.weight, linear.bias))


def widened_like(linear: nn.Linear) -> nn.Linear:
    widen(linear)
    assert type(linear) is WideLinear
    return linear


def test_a_mismatch_of_dtypes_is_still_an_error(narrow_cpu):
    with pytest.raises(RuntimeError):
        widened(torch.bfloat16)(torch.randn(64, 48))


def test_only_plain_linears_are_widened():
    class Other(nn.Linear):
        pass

    module = nn.Sequential(Other(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Embedding(4, 4))
    weight = module[1][0].weight
    widen(module)
    assert type(module[0]) is Other
    assert type(module[1][0]) is WideLinear
    assert module[1][0].weight is weight
    assert list(module.state_dict()) == ["0.weight", "0.bias", "1.0.weight", "1.0.bias", "2.weight"]
