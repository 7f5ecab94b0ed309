"""Experts that the text seldom reaches: shown tokens for their statistics, while the block computes what it did."""

import logging

import pytest
import torch

from atomcli.pipeline.calibrate import calibrate
from atomcli.pipeline.compress import compress
from atomcli.pipeline.hessians import watched
from atomcli.pipeline.model import start_walk
from atomcli.pipeline.parameters import fold, targets
from atomcli.pipeline.road import _forced
from atomcli.pipeline.routing import routing_of
from atomcli.pipeline.select import select
from atomcli.runtime.decoder import build_block
from tests.pipeline.conftest import small_recipe

SPARSE = {"mixtral": 0, "qwen3_moe": 1}  # a sparse block of each family


@pytest.fixture(params=SPARSE)
def block(request, parent):
    walk, index = start_walk(parent(request.param), "cpu"), SPARSE[request.param]
    return walk, index, build_block(walk.family, walk.config, index, walk.read(index))


def hidden_states(walk, sequences=3, tokens=9):
    return torch.randn(sequences, tokens, walk.config.hidden_size, generator=torch.Generator().manual_seed(1))


def test_forcing_leaves_what_the_block_computes_alone(block):
    walk, index, module = block
    hidden = hidden_states(walk)
    plain = walk.forward(module, index, hidden)
    with routing_of(module, {0: 4, 3: 9}):
        assert torch.equal(walk.forward(module, index, hidden), plain)
    assert torch.equal(walk.forward(module, index, hidden), plain)


def test_a_forced_expert_sees_the_tokens_it_is_liked_for_most(block):
    walk, index, module = block
    hidden, seen, scores = hidden_states(walk), [], []
    inputs = []
    with routing_of(module, {2: 2}) as routing:
        expert = module.mlp.experts[2]
        expert.register_forward_pre_hook(lambda m, a: seen.append((routing.forcing, a[0])))
        module.mlp.gate.register_forward_hook(lambda m, a, o: scores.append((o[0], o[2])))
        module.mlp.experts.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
        walk.forward(module, index, hidden)
    (logits, chosen), (routed,) = scores[0], inputs
    liking = logits[:, 2].float().masked_fill((chosen == 2).any(dim=1), -torch.inf).view(3, 9)
    expected = torch.cat(
        [routed.view(3, 9, -1)[number, row.topk(2).indices.sort().values] for number, row in enumerate(liking)]
    )
    (forced,) = [x for forcing, x in seen if forcing]
    assert torch.equal(forced, expected)


def test_how_many_sequences_run_at_once_changes_no_count(block):
    """Sequence by sequence or all at once, again after a failure or not: each token counts once at each linear."""
    walk, index, module = block
    recipe = small_recipe(kv_cache={"format": "none", "hadamard": False})
    energies = {
        site.name: torch.ones(walk.in_features(index, site.of_expert(0)[0]))
        for site in walk.family.sites(walk.config, index)
    }
    found = targets(walk, index, select(recipe, walk), energies)
    hidden = hidden_states(walk)

    def collected(forwards):
        with watched(module, found, walk.device, forced={1: 3}) as (hessians, routing):
            for at, chunk in forwards:
                routing.again(at)
                walk.forward(module, index, chunk)
        return hessians

    whole = collected([(0, hidden)])
    one_by_one = collected([(number, hidden[number : number + 1]) for number in range(3)])
    repeated = collected([(0, hidden[:2]), (0, hidden[:1]), (1, hidden[1:2]), (2, hidden[2:])])
    for first, second, third, target in zip(whole, one_by_one, repeated, found, strict=True):
        assert (first.tokens, first.forced) == (second.tokens, second.forced) == (third.tokens, third.forced)
        assert torch.allclose(first.total, second.total, rtol=1e-4, atol=1e-4)
        assert torch.allclose(first.total, third.total, rtol=1e-4, atol=1e-4)
        assert first.forced == (9 if target.expert == 1 else 0)
    assert sum(h.tokens for h, t in zip(whole, found, strict=True) if t.site == "qkv") == 27


def test_starved_experts_are_reported_and_calibrated_with_enough(parent, tokens, tmp_path, caplog):
    """144 tokens, of which two of four experts get each: about 72 for experts with 80 and 112 channels."""
    with caplog.at_level(logging.INFO, logger="atomcli"):
        report = compress(parent("mixtral"), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert "model.layers.0: routing was forced for the statistics of" in caplog.text
    experts = [row for row in report["layers"] if ".experts." in row["linear"]]
    assert len(experts) == 2 * 4 * 3
    assert any(row["tokens"] - row["forced_tokens"] < 80 for row in experts)
    for row in experts:
        assert row["tokens"] >= 105  # the quantized stream routes a little differently than the parent did
        assert 0 < row["error"] < 0.5
    assert all("forced_tokens" not in row for row in report["layers"] if ".experts." not in row["linear"])


def test_only_what_lacks_tokens_is_forced(parent, tokens, tmp_path):
    source = parent("mixtral")
    walk, recipe = start_walk(source, "cpu"), small_recipe()
    statistics = calibrate(source, recipe, tmp_path / "artifact", tokens=tokens, device="cpu").statistics(0)
    plan = select(recipe, walk)
    _, energies = fold(walk.read(0), walk, 0, plan, statistics)
    wanted = _forced(targets(walk, 0, plan, energies), statistics, tokens.shape[0])
    seen = statistics["gate_up"].tokens.tolist()
    assert sum(seen) == 2 * tokens.numel()
    for expert, count in enumerate(seen):
        lacking = max(0, 112 - count)  # down has more channels than gate and up
        assert wanted.get(expert, 0) == -(-lacking // tokens.shape[0])
