"""Recipes: the ones that ship, what they resolve to, and what a wrong one is told."""

from pathlib import Path

import pytest
import yaml

from atomcli.cli.options import DEFAULT_RECIPE
from atomcli.errors import UsageError
from atomcli.formats.scheme import ActivationFormat, KVFormat, Scheme, WeightFormat, scheme_named
from atomcli.overrides import override
from atomcli.recipe import load_recipe, parse_recipe, shipped_recipes, size_in_bytes

SHIPPED = {
    "atom-paper", "atom-w4a4", "rtn-w4a4", "atom-best", "atom-w4a8", "atom-w4a8-o0", "w8a8", "w4a16", "fp4", "mxfp4",
    "nvfp4", "w4a16-plain", "w4a8-plain", "w4a4-plain", "nvfp4-plain", "mxfp4-plain",
}  # fmt: skip


def test_every_shipped_recipe_loads_under_its_own_name():
    assert set(shipped_recipes()) == SHIPPED
    for name in SHIPPED:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
        assert parse_recipe(recipe.resolved()) == recipe


def test_the_paper_recipe_is_the_papers():
    recipe = load_recipe("atom-paper")
    assert recipe.scheme() == Scheme(
        WeightFormat("int4", 128, "fp16"), ActivationFormat("int4", 128, "fp16", True, 0.9), 128, "none"
    )
    assert (recipe.weights.clip, recipe.weights.rounding) == (0.85, "gptq")
    kv = recipe.kv_cache.to_format()
    assert (kv.element, kv.position, kv.hadamard) == ("int4", "before_rope", False)
    better_cache = load_recipe("atom-w4a4")
    assert better_cache.scheme() == recipe.scheme()
    assert better_cache.kv_cache.to_format() == KVFormat("int4", "after_rope", True, True)


def test_recipes_with_a_4_bit_cache_rotate_and_center_their_keys():
    """All but the paper's own and what is compared with it; the default is one of them."""
    assert DEFAULT_RECIPE in SHIPPED
    for name in SHIPPED - {"atom-paper", "atom-w4a4", "rtn-w4a4"}:
        kv = load_recipe(name).kv_cache.to_format()
        assert kv.element == "float" or kv == KVFormat("int4", "after_rope", True, True, True)


def test_rules_first_match_wins():
    recipe = parse_recipe(
        {
            "name": "mine",
            "rules": [
                {"match": "model.layers.0.*", "keep": True},
                {"match": "down_proj", "scheme": "w8a8"},
                {"match": "*.mlp.*", "keep": True},
            ],
        }
    )
    assert recipe.scheme_for("model.layers.0.mlp.down_proj", 512) is None
    assert recipe.scheme_for("model.layers.1.mlp.down_proj", 512).name == "w8a8"
    assert recipe.scheme_for("model.layers.1.mlp.up_proj", 512) is None
    assert recipe.scheme_for("model.layers.1.self_attn.q_proj", 512) == recipe.scheme()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"wieghts": {}}, "unknown key wieghts; .*did you mean weights"),
        ({"weights": {"grp": 128}}, "unknown key weights.grp; .*did you mean group"),
        ({"rules": [{"match": "x", "keeep": True}]}, "unknown key rules.0.keeep; .*did you mean keep"),
        ({"weights": {"format": "int5"}}, "weights.format is 'int5': allowed are .*did you mean int[48]"),
        ({"weights": {"group": 100}}, "weights.group is 100: must be one of 16, 32, 64, 128, 256"),
        ({"weights": {"clip": 1.5}}, "weights.clip is 1.5: must lie between"),
        ({"weights": {"clip": "serach"}}, "weights.clip is 'serach'"),
        ({"weights": {"rounding": "gtpq"}}, "did you mean gptq"),
        ({"weights": {"format": "nvfp4", "group": 128}}, "nvfp4 has groups of 16, not 128"),
        ({"weights": {"group": 64}}, "weights.group is 64 and activations.group is 128"),
        ({"calibration": {"samples": 0}}, "calibration.samples is 0"),
        ({"rules": [{"match": "x", "scheme": "w4a5"}]}, "did you mean w4a[48]"),
        ({"rules": [{"match": "x"}]}, "a rule says either keep: true or scheme"),
        ({"kv_cache": {"format": "int4", "hadamard": True, "position": "before_rope"}}, "after_rope"),
        ({"activations": {"symmetric": False}}, "two_level"),
        (
            {"select": {"candidates": ["w4a8"]}},
            "select: needs exactly one of bits_per_weight, memory, max_kld, latency",
        ),
        ({"select": {"memory": "1GB", "max_kld": 0.1}}, "it has memory and max_kld"),
        ({"select": {"memory": "much"}}, "select.memory is 'much': must be a number of bytes"),
        ({"select": {"max_kld": 0.1, "candidates": ["w4a7"]}}, "did you mean w4a[48]"),
        ({"select": {"latency": 10}}, "latency needs costs"),
        ({"select": {"bits_per_weigth": 4}}, "unknown key select.bits_per_weigth; .*did you mean bits_per_weight"),
        ({"weights": {"damping_rule": "relativ"}}, "did you mean relative"),
        ({"transform_seed": 1}, "transform_seed draws the signs of a Hadamard, but transform is none"),
        ({"order": "natural", "outliers": {"channels": 16}}, "order natural leaves no channels .*-o16 has outliers"),
        ({"order": "natural", "rules": [{"match": "x", "scheme": "w4a8"}]}, "order natural leaves no channels"),
        ({"order": "nature"}, "did you mean natural"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(data, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_recipe({"name": "wrong", **data})
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path):
    with pytest.raises(UsageError, match="did you mean atom-paper"):
        load_recipe("atom-papr")
    (tmp_path / "bad.yaml").write_text("weights: [")
    with pytest.raises(UsageError, match="can't be read"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UsageError, match="no mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_a_recipe_file_of_ones_own(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"weights": {"format": "int8", "group": None}, "activations": {"format": "none"}}))
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.scheme().name == "w8a16"


def test_overrides():
    recipe = override(load_recipe("atom-w4a4"), group=64, samples=8, outliers=32, kv_cache="none", rounding="rtn")
    assert recipe.scheme().name == "w4a4-g64-o32"
    assert recipe.calibration.samples == 8
    assert recipe.calibration.sequence_length == 2048
    assert recipe.kv_cache.to_format().element == "float"
    assert recipe.weights.rounding == "rtn"
    assert override(load_recipe("atom-best"), bits=8).scheme().weights == WeightFormat("int8", 128, "fp16")
    assert override(load_recipe("atom-w4a4"), bits=4) == load_recipe("atom-w4a4")
    eight = override(load_recipe("atom-w4a4"), bits=8)
    assert (eight.weights.clip, eight.activations.clip) == (1.0, 1.0)
    assert override(load_recipe("atom-w4a4"), bits=8, clip=0.9).weights.clip == 0.9
    for wrong, message in (({"bits": 5}, "--bits is 5"), ({"group": 100}, "--group is 100")):
        with pytest.raises(UsageError, match=message):
            override(recipe, **wrong)
    with pytest.raises(UsageError, match="did you mean gptq"):
        override(recipe, rounding="gptqq")


def test_more_outliers_than_channels_is_refused():
    recipe = override(load_recipe("atom-w4a4"), outliers=600)
    with pytest.raises(UsageError, match=r"600 outliers, but model\.layers\.0\.self_attn\.q_proj has only 576"):
        recipe.scheme_for("model.layers.0.self_attn.q_proj", 576)


def test_sizes():
    assert size_in_bytes(12) == 12
    assert size_in_bytes("10GiB") == 10 * 2**30
    assert size_in_bytes("1.5 MB") == 1_500_000
    assert size_in_bytes("2KiB") == 2048
    assert [size_in_bytes(each) for each in ("", "GB", "10 elephants", -3, 0)] == [0] * 5


def test_candidates_of_a_selection():
    recipe = override(load_recipe("atom-w4a8"), bits_per_weight=4.5)
    assert recipe.select is not None
    assert recipe.select.budget == ("bits_per_weight", 4.5)
    names = list(recipe.candidates())
    assert names == ["w4a8-2l-g128-o128-had", "w4a8-2l-g128-o64-had", "w4a8-2l-g128-had", "w8a8", "w16a16"]
    assert recipe.candidates()["w16a16"] is None
    named = override(recipe, memory="10GiB", candidates=["w4a4-g64-o32", "nvfp4"])
    assert [scheme.name for scheme in named.candidates().values()] == ["w4a4-2l-asym-g64-o32-had", "nvfp4-w4a4-g16"]
    assert named.select.budget == ("memory", 10.0 * 2**30)
    with pytest.raises(UsageError, match="needs a budget"):
        override(load_recipe("atom-w4a8"), candidates=["w4a4"])


@pytest.mark.parametrize("name", ["w4a9", "w8a8-g64", "w4a4-g100", "-o8", "w4a8-o"])
def test_variants_that_no_scheme_has(name):
    with pytest.raises(UsageError):
        scheme_named(name)
