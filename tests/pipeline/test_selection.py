"""Stage 2: sensitivities are measured once, budgets are met, fused groups stay together, plans know their model."""

import json
from contextlib import suppress

import pytest
import torch

from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.errors import InputError, UsageError
from atomcli.pipeline import road
from atomcli.pipeline import sensitivities as stage
from atomcli.pipeline.budget import choose, choose_cache, loss_table, plan_of, sizes_of
from atomcli.pipeline.calibrate import calibrate
from atomcli.pipeline.compress import compress
from atomcli.pipeline.hessians import Hessian, InputsSeen, watched
from atomcli.pipeline.model import start_walk
from atomcli.pipeline.parameters import fold, targets
from atomcli.pipeline.residual import residual_weights
from atomcli.pipeline.select import groups_of, load_plan, save_plan, select, uniform
from atomcli.pipeline.sensitivities import sensitivities_of
from atomcli.runtime.decoder import build_block, load_checkpoint
from tests.pipeline.conftest import small_recipe

CANDIDATES = ["w4a4-g16-o16", "w4a8-g16-o16", "w4a8-g16-o0", "w8a8", "w16a16"]


def budgeted(budget=None, **sections):
    return small_recipe(select=(budget or {"bits_per_weight": 7.0}) | {"candidates": CANDIDATES}, **sections)


@pytest.fixture
def measured(parent, tokens, tmp_path):
    def measure(family="llama", recipe=None):
        source, recipe = parent(family), recipe or budgeted()
        walk = start_walk(source, "cpu")
        artifact = calibrate(source, recipe, tmp_path / "artifact", tokens=tokens, device="cpu")
        groups = groups_of(recipe, walk)
        return walk, recipe, artifact, groups, sensitivities_of(walk, recipe, artifact, groups)

    return measure


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_sensitivities_are_those_of_the_model(family, measured):
    _, _, _, groups, found = measured(family)
    names = {"experts"} if family == "mixtral" else {"gate_up", "down"}
    assert {group.name for group in groups} == {"qkv", "o"} | names
    assert [each.group for each in found.groups] == [group.title for group in groups]
    assert found.joint_kld > found.cache_kld > 0
    for each in found.groups:
        assert each.reference == CANDIDATES[0]
        assert found.joint_kld > each.kld > 0
        assert each.errors["w8a8"] < each.errors["w4a8-g16-o0"]
        assert each.errors["w4a8-g16-o16"] < each.errors["w4a4-g16-o16"]
    table = loss_table(groups, found)
    assert sum(row[0] for row in table) + found.floor == pytest.approx(found.joint_kld)
    assert all(row[-1] == 0 for row in table)


def test_a_second_plan_is_free_and_a_changed_file_is_refused(measured, monkeypatch):
    walk, recipe, artifact, groups, found = measured()
    monkeypatch.setattr(stage, "_measure", lambda *arguments: pytest.fail("measured again"))
    assert sensitivities_of(walk, recipe, artifact, groups) == found
    cheaper = budgeted({"max_kld": 10.0})
    assert sensitivities_of(walk, cheaper, artifact, groups_of(cheaper, walk)) == found
    (path,) = artifact.directory.glob("sensitivities-*.json")
    data = json.loads(path.read_text())
    data["identity"]["artifact"]["model"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="of another model or recipe"):
        sensitivities_of(walk, recipe, artifact, groups)
    path.write_text('{"identity": 1}')
    with pytest.raises(InputError):
        sensitivities_of(walk, recipe, artifact, groups)


def test_other_candidates_are_measured_anew(measured):
    walk, _, artifact, _, _ = measured()
    other = small_recipe(select={"bits_per_weight": 8.5, "candidates": ["w8a8", "w4a8-g16-o0"]})
    assert sensitivities_of(walk, other, artifact, groups_of(other, walk)).groups[0].reference == "w8a8"
    assert len(list(artifact.directory.glob("sensitivities-*.json"))) == 2


@pytest.mark.parametrize(
    "budget", [{"bits_per_weight": 6.5}, {"memory": 110_000}, {"max_kld": 0.2}], ids=lambda each: next(iter(each))
)
def test_a_budget_is_met_and_used(budget, measured):
    walk, _, _, groups, found = measured()
    plan = choose(budgeted(budget), walk, groups, found)
    cache = choose_cache(budgeted(budget), walk, found)
    sizes = sizes_of(walk, groups, False, cache.formats)
    uniforms = [
        plan_of(walk, groups, [index] * len(groups), sizes, found, cache).prediction for index in range(len(CANDIDATES))
    ]
    ((name, limit),) = budget.items()
    key = {"memory": "bytes", "max_kld": "kld"}.get(name, name)
    assert plan.prediction[key] <= limit
    other = "bytes" if name == "max_kld" else "kld"
    for each in uniforms:
        assert each[key] > limit or plan.prediction[other] <= each[other]
    for index in range(walk.blocks):
        for site in walk.family.sites(walk.config, index):
            plan.of_site(index, site)
            assert len({plan.schemes[f"model.layers.{index}.{linear}"] for linear in site.linears}) == 1


def test_blocks_whose_cache_costs_most_get_eight_bits(measured):
    walk, recipe, _, groups, found = measured()
    assert len(found.caches) == walk.blocks
    assert all(0 < each < found.joint_kld for each in found.caches)
    plain = choose(recipe, walk, groups, found)
    assert {kv.element for kv in plain.cache} == {"int4"}
    bits = plain.prediction["cache"]["bits"]
    assert bits == pytest.approx(4 + 32 / walk.config.head_dim)
    chosen = choose(budgeted({"bits_per_weight": 7.0, "kv_bits": bits + 4 / walk.blocks}), walk, groups, found)
    worst = max(range(walk.blocks), key=lambda index: found.caches[index])
    assert chosen.prediction["cache"]["int8"] == [worst]
    assert [kv.element for kv in chosen.cache].index("int8") == worst
    assert chosen.schemes == plain.schemes, "the weights have a budget of their own"
    gained = plain.prediction["kld"] - chosen.prediction["kld"]
    assert gained == pytest.approx(found.cache_loss(worst) * (1 - (15 / 255) ** 2))
    with pytest.raises(UsageError, match="kv_bits 1 can't be met"):
        choose(budgeted({"bits_per_weight": 6.5, "kv_bits": 1}), walk, groups, found)


def test_a_cache_by_blocks_reaches_the_checkpoint(parent, tokens, tmp_path):
    recipe = small_recipe(kv_cache={"format": "int4", "hadamard": True, "centered": True, "int8": [1]})
    compress(parent(), recipe, tmp_path / "out", tokens=tokens, device="cpu")
    layers = load_checkpoint(tmp_path / "out").model.layers
    assert [layer.self_attn.kv.element for layer in layers] == ["int4", "int8"]
    assert all(float(layer.self_attn.key_center.abs().max()) > 0 for layer in layers)
    with pytest.raises(UsageError, match="names block 7"):
        compress(parent(), small_recipe(kv_cache={"format": "int4", "int8": [7]}), tmp_path / "no", tokens=tokens)


def test_the_whole_road_under_a_budget(parent, tokens, tmp_path):
    report = compress(parent("mixtral"), budgeted(), tmp_path / "out", tokens=tokens, device="cpu")
    assert report["plan"]["bits_per_weight"] <= 7
    assert report["plan"]["bytes"] == sum(record["bytes"] for record in report["layers"]) + _kept_bytes(
        tmp_path / "out", report
    )
    for index in range(2):
        experts = {row["scheme"] for row in report["layers"] if f"layers.{index}.mlp.experts" in row["linear"]}
        assert len(experts) <= 1
    assert 0.3 < report["plan"]["kld"] / report["proof"]["kld"] < 3


def _kept_bytes(directory, report):
    quantized = {row["linear"] for row in report["layers"]}
    total = 0
    for path in directory.glob("*.safetensors"):
        file = TensorFile(path)
        total += sum(file.read(name).nbytes for name in file.entries if name.rpartition(".")[0] not in quantized)
    return total


def test_a_resumed_run_follows_the_same_plan(parent, tokens, tmp_path, monkeypatch):
    expected = compress(parent(), budgeted(), tmp_path / "whole", tokens=tokens, device="cpu")
    real = road.write_shard

    def fail_once(directory, file, tensors):
        if file == "model-00002.safetensors":
            raise KeyboardInterrupt
        return real(directory, file, tensors)

    monkeypatch.setattr(road, "write_shard", fail_once)
    with pytest.raises(KeyboardInterrupt):
        compress(parent(), budgeted(), tmp_path / "out", tokens=tokens, device="cpu")
    monkeypatch.setattr(road, "write_shard", real)
    monkeypatch.setattr(stage, "_measure", lambda *arguments: pytest.fail("measured again"))
    report = compress(parent(), budgeted(), tmp_path / "out", tokens=tokens, device="cpu")
    assert report["plan"] == expected["plan"]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_rules_go_before_a_budget(measured):
    rules = [{"match": "model.layers.0.mlp.*", "keep": True}, {"match": "o_proj", "scheme": "w8a8"}]
    walk, recipe, _, groups, found = measured(recipe=budgeted({"bits_per_weight": 13.0}, rules=rules))
    plan = select(recipe, walk, found)
    assert plan.schemes["model.layers.0.mlp.up_proj"] is None
    assert {plan.schemes[f"model.layers.{index}.self_attn.o_proj"].name for index in range(2)} == {"w8a8"}
    assert {tuple(group.candidates) for group in groups if group.name == "o"} == {("w8a8",)}


def test_what_can_not_be_is_refused_before_anything_is_measured(parent, tokens, tmp_path):
    for budget, message in (
        ({"bits_per_weight": 4.0}, "the nearest budget that can is"),
        ({"memory": "1kB"}, "memory 1000 bytes can't be met"),
    ):
        with pytest.raises(UsageError, match=message):
            compress(parent(), budgeted(budget), tmp_path / "out", tokens=tokens, device="cpu")
    with pytest.raises(UsageError, match=r"q_proj 16 bits and .*k_proj"):
        compress(
            parent(), budgeted(rules=[{"match": "q_proj", "keep": True}]), tmp_path / "out", tokens=tokens, device="cpu"
        )
    assert list(tmp_path.iterdir()) == []


def test_latency_is_that_of_the_table(measured, tmp_path):
    walk, _, _, _, found = measured()
    shapes = {(walk.in_features(0, name), name) for name in walk.family.linears(walk.config, 0)}
    block = build_block(walk.family, walk.config, 0, walk.read(0))
    rows = [
        {
            "labels": {"N": block.get_submodule(name).out_features, "K": columns, "M": 16, "kernel": kernel},
            "measures": {"time": {"median": time, "unit": "µs"}},
        }
        for columns, name in shapes
        for kernel, time in (("cuBLAS bf16", 9.0), ("atom w8a8", 5.0), ("atom w4a8-2l-g16-had + quantize", 3.0))
    ]
    (tmp_path / "costs.json").write_text(json.dumps({"rows": rows}))

    def chosen(latency):
        budget = {"latency": latency, "costs": str(tmp_path / "costs.json")}
        few = small_recipe(select=budget | {"candidates": ["w4a8-g16-o0", "w8a8", "w16a16"]})
        return choose(few, walk, groups_of(few, walk), found)

    kinds = [scheme and scheme.name for scheme in chosen(14 * 3.0 + 2 * 2.0 + 0.5).schemes.values()]
    assert kinds.count("w8a8") == 2
    assert kinds.count(None) == 0
    assert all(scheme is None for scheme in chosen(14 * 9.0).schemes.values())
    with pytest.raises(UsageError, match=r"latency 41 µs can't be met .* nearest budget that can is 42"):
        chosen(41)
    (tmp_path / "costs.json").write_text(json.dumps({"rows": rows[:1]}))
    with pytest.raises(InputError, match="has no time of"):
        chosen(100)


def test_a_plan_is_of_one_model_and_recipe(parent, tmp_path):
    walk, recipe = start_walk(parent(), "cpu"), small_recipe()
    path = tmp_path / "plan.json"
    save_plan(uniform(recipe, walk), recipe, walk, path)
    assert load_plan(path, budgeted(), walk).schemes == uniform(recipe, walk).schemes
    with pytest.raises(InputError, match="made for another model"):
        load_plan(path, recipe, start_walk(parent("qwen3"), "cpu"))
    with pytest.raises(InputError, match="made for another recipe"):
        load_plan(path, small_recipe(weights={"clip": 0.9}), walk)
    data = json.loads(path.read_text())
    for damage in ({"model": "tiny"}, {"schemes": []}, {"schemes": {"w4a4-g16-o16": {}}}, {"linears": []}):
        path.write_text(json.dumps(data | damage))
        with pytest.raises(InputError, match=r"plan\.json is damaged"):
            load_plan(path, recipe, walk)
    data["linears"]["model.layers.0.self_attn.q_proj"] = None
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=r"q_proj 16 bits and .*k_proj"):
        load_plan(path, recipe, walk)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_token_weights_are_those_of_the_residual_stream(family, measured):
    """down's Hessian under weights is X^T diag(1 / mean square of the stream after attention) X, expert by expert."""
    walk, _, artifact, _, _ = measured(family)
    recipe = small_recipe(activations={"format": "none", "group": None}, weights={"token_weights": "residual"})
    plan = uniform(recipe, walk)
    tensors, energies = fold(walk.read(0), walk, 0, plan, artifact.statistics(0))
    block = build_block(walk.family, walk.config, 0, tensors)
    hidden = torch.randn(2, 9, walk.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = targets(walk, 0, plan, energies)
    seen: dict[str, torch.Tensor] = {}
    stream: dict[str, torch.Tensor] = {}
    target = next(each for each in found if each.site == "down")
    down = block.get_submodule(target.linears[0])
    handles = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda m, a: stream.update(after=a[0].detach())),
        down.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].detach().reshape(-1, down.in_features))),
    ]
    with residual_weights(block) as residual:
        walk.forward(block, 0, hidden)
        weights = residual.of("down", target.expert)
        assert residual.of("qkv", None) is None
    for handle in handles:
        handle.remove()
    every = 1 / stream["after"].reshape(-1, walk.config.hidden_size).square().mean(-1)
    assert set(weights.tolist()) <= set(every.tolist())
    if family == "llama":
        assert torch.equal(weights, every)
    expected = Hessian(down.in_features, walk.device)
    expected.add(target.layout.apply(seen["x"]) * weights.sqrt()[:, None])
    with watched(block, found, walk.device, "residual") as (hessians, _), suppress(InputsSeen):
        walk.forward(block, 0, hidden)
    position = found.index(target)
    assert hessians[position].tokens == seen["x"].shape[0]
    assert torch.allclose(hessians[position].mean(), expected.mean(), rtol=1e-4, atol=1e-5)


def test_seeded_signs_are_in_the_checkpoint_and_change_it(parent, tokens, tmp_path):
    def shard(seed):
        out = tmp_path / f"seed-{seed}"
        if not out.exists():
            recipe = small_recipe(transform="hadamard", transform_seed=seed)
            compress(parent(), recipe, out, tokens=tokens, device="cpu")
        config = json.loads((out / "config.json").read_text())["quantization_config"]["linears"]
        entry = config["model.layers.1.mlp.down_proj"]
        return entry.get("signs", False), (out / "model-00002.safetensors").read_bytes()

    assert shard(None)[0] is False
    assert shard(0)[0] is True
    assert shard(0)[1] != shard(1)[1]
    with pytest.raises(UsageError, match="transform_seed"):
        small_recipe(transform="none", transform_seed=0)


@pytest.mark.parametrize("change", [{"damping": 0.1}, {"damping_rule": "relative"}, {"token_weights": "residual"}])
def test_options_of_the_hessian_reach_the_weights(change, parent, tokens, tmp_path):
    compress(parent(), small_recipe(), tmp_path / "plain", tokens=tokens, device="cpu")
    compress(parent(), small_recipe(weights=change), tmp_path / "changed", tokens=tokens, device="cpu")
    shards = [(tmp_path / name / "model-00002.safetensors").read_bytes() for name in ("plain", "changed")]
    assert shards[0] != shards[1]
