"""Stage 3: folds leave the block's function alone, Hessians are those of the inputs the product sees."""

from contextlib import suppress

import pytest
import torch

from atomcli.checkpoint.verify import read_checkpoint
from atomcli.kernels.reference import quantized_input
from atomcli.pipeline.calibrate import calibrate
from atomcli.pipeline.compress import compress
from atomcli.pipeline.hessians import Hessian, InputsSeen, pooled, watched
from atomcli.pipeline.model import start_walk
from atomcli.pipeline.parameters import _enough, fold, targets
from atomcli.pipeline.ranks import ALONE
from atomcli.pipeline.select import select
from atomcli.runtime.decoder import build_block
from atomcli.runtime.linear import QuantLinear
from tests.helpers.tiny import NAMES
from tests.pipeline.conftest import small_recipe


@pytest.fixture
def prepared(parent, tokens, tmp_path):
    def prepare(family, recipe=None, **overrides):
        source, recipe = parent(family, **overrides), recipe or small_recipe()
        walk = start_walk(source, "cpu")
        artifact = calibrate(source, recipe, tmp_path / "artifact", tokens=tokens, device="cpu")
        return walk, select(recipe, walk), artifact

    return prepare


@pytest.mark.parametrize("family", NAMES)
def test_a_folded_block_computes_the_same(family, prepared):
    walk, plan, artifact = prepared(family)
    hidden = torch.randn(2, 9, walk.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for index in range(walk.blocks):
        tensors = walk.read(index)
        folded, energies = fold(tensors, walk, index, plan, artifact.statistics(index))
        name = next(name for name in tensors if name.endswith("down_proj.weight"))
        assert not torch.equal(folded[name], tensors[name])
        assert bool((energies["down"].diff() >= 0).all())
        before, after = (build_block(walk.family, walk.config, index, each) for each in (tensors, folded))
        expected, found = (walk.forward(block, index, hidden) for block in (before, after))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama_biased"])
def test_o_is_folded_into_v_where_the_heads_allow_it(family, prepared):
    """One head that is not shared: any order of its channels, and of v's biases, is inside the head."""
    walk, plan, artifact = prepared(family, num_attention_heads=1, num_key_value_heads=1, head_dim=48)
    tensors = walk.read(0)
    folded, energies = fold(tensors, walk, 0, plan, artifact.statistics(0))
    assert not torch.equal(folded["self_attn.v_proj.weight"], tensors["self_attn.v_proj.weight"])
    layouts = {target.site: target.layout for target in targets(walk, 0, plan, energies)}
    assert layouts["o"].permutation is None
    assert layouts["qkv"].permutation is not None
    hidden = torch.randn(2, 9, walk.config.hidden_size, generator=torch.Generator().manual_seed(1))
    before, after = (build_block(walk.family, walk.config, 0, each) for each in (tensors, folded))
    assert torch.allclose(walk.forward(before, 0, hidden), walk.forward(after, 0, hidden), rtol=1e-4, atol=1e-4)


def test_o_keeps_its_gather_across_heads(prepared):
    walk, plan, artifact = prepared("llama")
    tensors = walk.read(0)
    folded, energies = fold(tensors, walk, 0, plan, artifact.statistics(0))
    assert torch.equal(folded["self_attn.v_proj.weight"], tensors["self_attn.v_proj.weight"])
    layouts = {target.site: target.layout for target in targets(walk, 0, plan, energies)}
    assert layouts["o"].permutation is not None


def test_a_hessian_is_symmetric_and_independent_of_the_chunks():
    x = torch.randn(70, 1100, generator=torch.Generator().manual_seed(0))
    whole, parts = Hessian(1100, torch.device("cpu")), Hessian(1100, torch.device("cpu"))
    whole.add(x)
    for part in x.split(13):
        parts.add(part)
    expected = 2 * x.double().t() @ x.double() / 70
    assert torch.allclose(whole.mean().double(), expected, atol=1e-4)
    assert torch.allclose(parts.mean(), whole.mean(), atol=1e-5)
    assert torch.equal(whole.mean(), whole.mean().t())
    assert not Hessian(8, torch.device("cpu")).mean().any()


@pytest.mark.parametrize("activations", [{}, {"format": "none", "group": None}], ids=["w4a4", "w4a16"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_hessians_are_of_the_inputs_that_the_product_sees(family, activations, prepared):
    recipe = small_recipe(activations=activations, kv_cache={"format": "none", "hadamard": False})
    walk, plan, artifact = prepared(family, recipe)
    tensors, energies = fold(walk.read(0), walk, 0, plan, artifact.statistics(0))
    block = build_block(walk.family, walk.config, 0, tensors)
    hidden = torch.randn(3, 9, walk.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = targets(walk, 0, plan, energies)
    seen = []
    linears = {name: block.get_submodule(name) for target in found for name in target.linears}
    with watched(block, found, walk.device) as (hessians, _):
        first = block.get_submodule(found[0].linears[0])
        first.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
        for sequence in hidden:
            with suppress(InputsSeen):
                walk.forward(block, 0, sequence[None])
        if not activations:
            assert isinstance(first, QuantLinear)
    inputs = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen])
    x = quantized_input(inputs, found[0].scheme, found[0].layout)
    assert torch.allclose(hessians[0].mean(), 2 * x.t() @ x / x.shape[0], rtol=1e-4, atol=1e-4)
    for target, hessian in zip(found, hessians, strict=True):
        expected = 27 if target.expert is None else None
        assert expected is None or hessian.tokens == expected
    experts = sum(
        h.tokens for t, h in zip(found, hessians, strict=True) if t.site == "gate_up" and t.expert is not None
    )
    assert experts == (27 * walk.config.num_experts_per_tok if family == "mixtral" else 0)
    assert all(block.get_submodule(name) is linear for name, linear in linears.items())


def test_an_expert_that_saw_too_little_leans_on_the_others(prepared):
    """Without a token of its own an expert is compensated as the average of all; with many, on its own inputs alone."""
    walk, plan, artifact = prepared("mixtral")
    _, energies = fold(walk.read(0), walk, 0, plan, artifact.statistics(0))
    found = [target for target in targets(walk, 0, plan, energies) if target.site == "gate_up"]
    generator = torch.Generator().manual_seed(0)
    hessians = [Hessian(target.layout.in_features, walk.device) for target in found]
    for hessian, tokens in zip(hessians, (0, 20, 500, 500), strict=True):
        hessian.add(torch.randn(tokens, walk.config.hidden_size, generator=generator))
    together = pooled(found, hessians, [0] * len(found), ALONE)["gate_up"]
    total = sum(hessian.mean() * hessian.tokens for hessian in hessians) / 1020
    assert torch.allclose(together, total, atol=1e-4)
    assert torch.equal(_enough(hessians[0], together), together)
    assert torch.equal(_enough(hessians[2], together), hessians[2].mean())
    mixed = hessians[1].mean() * 0.25 + together * 0.75  # 20 tokens for 80 channels
    assert torch.allclose(_enough(hessians[1], together), mixed, atol=1e-6)


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_natural_order_moves_nothing(parent, tokens, tmp_path, rounding):
    recipe = small_recipe(
        weights={"format": "nvfp4", "group": 16, "rounding": rounding, "clip": 1.0},
        activations={"format": "nvfp4", "group": 16, "clip": 1.0},
        outliers={"channels": 0},
        order="natural",
    )
    report = compress(parent(), recipe, tmp_path / "out", tokens=tokens, device="cpu")
    made = read_checkpoint(tmp_path / "out")
    assert not any("permutation" in entry for entry in made.quantization["linears"].values())
    rows = {row["linear"]: row["input_absmax"] for row in report["layers"]}
    for block in range(2):
        prefix = f"model.layers.{block}."
        for site in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            units = {float(made.read(f"{prefix}{linear}.weight_tensor_scale")) for linear in site}
            assert len(units) == 1  # engines fuse these linears, and then have one scale for all of them
            assert len({rows[prefix + linear] for linear in site}) == 1
    assert all(value > 0 for value in rows.values())
