"""Sorting tokens by expert and adding up what comes back; which experts can be one product."""

from itertools import pairwise

import torch

from atomcli.formats.scheme import SCHEMES
from atomcli.runtime.experts import Expert, Experts
from atomcli.runtime.grouped_experts import choose, combine, sort_by_expert
from atomcli.runtime.linear import QuantLinear


def test_sorted_tokens_add_up_as_experts_in_turn() -> None:
    torch.manual_seed(0)
    tokens, count, k = 23, 7, 3
    hidden = torch.randn(tokens, 5, dtype=torch.float64)
    matrices = torch.randn(count, 5, 5, dtype=torch.float64)
    weights, chosen = torch.rand(tokens, count, dtype=torch.float64).topk(k)
    chosen[chosen == 4] = 5  # nobody takes expert 4
    order, starts = sort_by_expert(chosen, count)
    assert starts.dtype == torch.int32
    assert starts.tolist() == [int((chosen < expert).sum()) for expert in range(count + 1)]
    routed = torch.empty(tokens * k, 5, dtype=torch.float64)
    for expert, (first, last) in enumerate(pairwise(starts)):
        rows = order[first:last] // k
        assert torch.equal(rows, rows.sort().values)
        routed[first:last] = hidden[rows] @ matrices[expert]
    expected = torch.einsum("tk,tc,tkcd->td", weights, hidden, matrices[chosen])
    torch.testing.assert_close(combine(routed, order, weights), expected)


def experts_in(scheme: str, activation: torch.nn.Module, **options: bool) -> Experts:
    experts = Experts(Expert(256, 384, activation, "meta") for _ in range(3))
    for expert in experts:
        for name, rows, channels in (("gate_proj", 384, 256), ("up_proj", 384, 256), ("down_proj", 256, 384)):
            linear = QuantLinear(channels, rows, SCHEMES[scheme], permutation=False, **options)
            setattr(expert, name, linear)
    return experts


def test_the_reason_why_experts_run_in_turn() -> None:
    silu = torch.nn.SiLU()
    plain = Experts(Expert(256, 384, silu, "cpu") for _ in range(2))
    assert plain.kernel_choice().reason == "some expert is not quantized"
    assert "not SiLU" in str(choose(experts_in("w4a8", torch.nn.GELU())).reason)
    assert choose(experts_in("w4a8", silu, bias=True)).reason == "some expert has a bias"
    mixed = experts_in("w4a8", silu)
    mixed[1].down_proj = QuantLinear(384, 256, SCHEMES["w4a4"], permutation=False)
    assert "differ in scheme" in str(choose(mixed).reason)
    assert choose(experts_in("w4a8", silu)).reason == "no CUDA device: the reference runs"
