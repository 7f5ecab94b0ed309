"""`atom recipes`: list, show, copy, validate."""

import json

import yaml

from atomcli.recipe import shipped_recipes


def test_list(atom, snapshot):
    snapshot(atom("recipes", "list"), "recipes-list")


def test_list_as_json_names_every_recipe(atom):
    outcome = atom("recipes", "list", "--json")
    assert [recipe["name"] for recipe in json.loads(outcome.out)["recipes"]] == list(shipped_recipes())


def test_show_is_a_recipe_again(atom, tmp_path, snapshot):
    outcome = atom("recipes", "show", "atom-w4a4")
    snapshot(outcome, "recipes-show")
    file = tmp_path / "again.yaml"
    file.write_text(outcome.out)
    assert atom("recipes", "validate", file).code == 0
    assert yaml.safe_load(outcome.out) == json.loads(atom("recipes", "show", "atom-w4a4", "--json").out)


def test_copy_keeps_comments_and_overwrites_only_when_told(atom, tmp_path, snapshot):
    file = tmp_path / "my.yaml"
    assert atom("recipes", "copy", "atom-w4a4", file).code == 0
    assert file.read_text() == shipped_recipes()["atom-w4a4"].read_text()
    snapshot(atom("recipes", "copy", "atom-w4a4", file), "recipes-copy-occupied")
    assert atom("recipes", "copy", "w8a8", file, "--force").code == 0
    assert file.read_text() == shipped_recipes()["w8a8"].read_text()


def test_a_copy_that_can_not_be_written_is_one_sentence(atom, tmp_path):
    for file, force in ((tmp_path / "no" / "my.yaml", []), (tmp_path, ["--force"])):
        outcome = atom("recipes", "copy", "atom-w4a4", file, *force)
        assert outcome.code == 2
        assert f"error: {file} can't be written" in outcome.err


def test_every_recipe_that_ships_is_valid(atom):
    for name in shipped_recipes():
        assert atom("recipes", "validate", name).code == 0
