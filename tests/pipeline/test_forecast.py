"""The trial before a run: of the model's own blocks, and extended along the right lines."""

import pytest
import torch

import atomcli.pipeline.forecast as module
from atomcli.errors import UsageError
from atomcli.pipeline.forecast import Shallow, Trial, _at, _middle, _numbers, forecast
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


def test_a_block_in_the_middle_is_the_mean_of_those_there_are():
    assert _middle([5.0, 3.0, 4.0, 1.0, 0.1], 4) == 3.5  # and not what the stage does after its blocks
    assert _middle([5.0, 3.0, 1.0], 3) == 3
    assert _middle([5.0, 1.0, 0.1], 2) == 1
    assert _middle([5.0, 0.1], 1) == 5


def test_a_gpu_tries_all_sequences_and_a_cpu_a_few():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert _numbers(cuda, 128, 2048, 2) == [128]
    assert _numbers(cuda, 512, 2048, 2) == [64, 128]
    assert _numbers(cuda, 4, 16, 1) == [4]
    assert _numbers(cpu, 128, 2048, 1) == [2, 8]
    assert _numbers(cpu, 2, 2048, 1) == [2]


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_a_run_is_its_trial_and_as_many_more_blocks_in_the_middle(blocks, parent, tmp_path, monkeypatch):
    """What lies between the stages counts as well, and what only the first and last block do counts once."""

    def steps(samples, blocks):
        each = {"calibrate": [2 + samples * 0.1] * blocks, "quantize": [3 + samples * 0.2] * blocks}
        each["quantize"][0] += 7
        each["quantize"][-1] -= 2
        return each | {"verify": [5.0, *[0.5] * (blocks - 1), 0.1]}

    def seconds(samples, blocks):
        return 1.5 + sum(map(sum, steps(samples, blocks).values()))

    def trial(source, recipe, walk, samples, length, scratch):
        tried = source.config.num_hidden_layers
        return Trial(seconds(samples, tried), steps(samples, tried), 1, None)

    monkeypatch.setattr(module, "_trial", trial)
    monkeypatch.setattr(module, "_hash_rate", lambda: torch.inf)
    recipe = small_recipe(calibration={"samples": 128, "sequence_length": 24})
    found = forecast(parent(num_hidden_layers=blocks), recipe, tmp_path, "cpu")
    assert found.seconds == pytest.approx(seconds(128, blocks))


def test_a_forecast_of_a_budget_is_refused(parent, tmp_path):
    recipe = small_recipe(select={"bits_per_weight": 6, "candidates": ["w4a8-g16-o16", "w8a8"]})
    with pytest.raises(UsageError, match="measures sensitivities"):
        forecast(parent(), recipe, tmp_path, "cpu")
