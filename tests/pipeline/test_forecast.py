"""The trial before a run: of the model's own blocks, and extended along the right lines."""

import pytest
import torch

from atomcli.errors import UsageError
from atomcli.pipeline.forecast import Shallow, _at, _whole, forecast
from atomcli.runtime.decoder import load_parent
from tests.helpers.tiny import NAMES, random_tokens
from tests.pipeline.conftest import small_recipe


@pytest.mark.parametrize("family", NAMES)
def test_a_shallow_model_is_the_beginning_of_the_whole_one(family, parent):
    whole = parent(family, num_hidden_layers=3)
    tokens = random_tokens(1, 9)
    deep = load_parent(whole).model(tokens, output_hidden_states=True).hidden_states[2]
    model = load_parent(Shallow(whole, 2)).model
    assert len(model.layers) == 2
    hidden = model(tokens, output_hidden_states=True).hidden_states[1]
    assert torch.equal(hidden, load_parent(whole).model(tokens, output_hidden_states=True).hidden_states[1])
    assert torch.equal(model(tokens).last_hidden_state, load_parent(whole).model.norm(deep))


def test_time_lies_on_the_line_through_two_trials():
    assert _at(128, {2: 3.0, 4: 5.0}) == 129
    assert _at(128, {2: 3.0, 4: 2.0}) == 2.0  # noise, not a machine that gets faster with more work
    assert _at(2, {2: 3.0}) == 3.0


def test_a_stage_is_its_first_and_last_block_and_as_many_in_the_middle_as_there_are():
    assert _whole([5.0, 3.0, 1.0], 10) == 5 + 8 * 3 + 1
    assert _whole([5.0, 3.0, 1.0], 3) == 9
    assert _whole([5.0, 1.0], 2) == 6
    assert _whole([5.0], 1) == 5


def test_a_forecast_of_a_budget_is_refused(parent, tmp_path):
    recipe = small_recipe(select={"bits_per_weight": 6, "candidates": ["w4a8-g16-o16", "w8a8"]})
    with pytest.raises(UsageError, match="measures sensitivities"):
        forecast(parent(), recipe, tmp_path, "cpu")
