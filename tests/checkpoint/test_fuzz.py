"""A taste of the fuzzing that `python -m tests.helpers.fuzz` does: damaged files end in one sentence."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atomcli.checkpoint.source import open_source
from atomcli.errors import AtomError
from atomcli.pipeline.model import start_walk
from tests.helpers.fuzz import TARGETS, check
from tests.helpers.tiny import random_parent


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size"])
@pytest.mark.parametrize("number", [-1, 0, 50_000, 2**31, 2**63])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_absurd_counts_are_refused_at_once(family, number, key, tmp_path):
    """Found by the fuzzer: two billion blocks were looked for one after the other."""
    random_parent(family)[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: number}))
    with pytest.raises(AtomError):
        start_walk(open_source(str(tmp_path)), "cpu")


@pytest.mark.parametrize("count", [2**31, 2**63])
def test_billions_of_experts_are_refused_at_once(count, tmp_path):
    random_parent("qwen3_moe")[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    (key,) = config.keys() & {"num_experts", "num_local_experts"}
    path.write_text(json.dumps(config | {key: count}))
    with pytest.raises(AtomError, match=r"experts"):
        start_walk(open_source(str(tmp_path)), "cpu")


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=60))
@example(data=b"")
@example(data=b"\xff[")  # nested without end
@example(data=b'\xff{"a":')
@example(data=b"\x00\x00\x00\x00\x00\x00\x00\x00\x00")
def test_damaged_files_end_in_one_sentence(target, data):
    check(target, data)
