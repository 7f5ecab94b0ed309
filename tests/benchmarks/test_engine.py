"""The bench of a vLLM server: against a stand-in everywhere, and against vLLM itself where it is installed."""

import importlib.util
from pathlib import Path

import pytest

from atomcli.benchmarks import client
from atomcli.benchmarks.engine import (
    Served,
    Setting,
    bench_engine,
    generated_per_second,
    last_error,
    memory_options,
    percentile,
)
from atomcli.benchmarks.workloads import Request, draw
from atomcli.errors import RunError
from tests.helpers import fake_vllm
from tests.helpers.tiny import VOCABULARY, random_parent, write_checkpoint
from tests.helpers.vllm_runs import ENVIRONMENT

REQUESTS = [Request(4, 20), Request(2, 10), Request(3, 20), Request(1, 1)]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory, and a server of it that costs nothing."""
    monkeypatch.setenv("PYTHONPATH", str(fake_vllm.install(tmp_path / "path")))
    return fake_vllm.model(tmp_path / "model")


def test_rows_of_a_server(stand_in: Path, tmp_path: Path) -> None:
    systems = [Served("one", str(stand_in)), Served("two", str(stand_in), ("--max-num-seqs", "1"))]
    seen: list[tuple[int, int]] = []
    setting = Setting(REQUESTS * 3, "mine", repeats=2, logs=tmp_path / "logs")
    first, second = bench_engine(systems, [None], setting, lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]
    assert (first.labels, first.note) == ({"workload": "mine", "model": "one"}, "")
    value = {name: measure.median for name, measure in first.measures.items() if measure is not None}
    assert value["KV room"] == 1600
    assert value["ratio"] == 1
    assert value["output tokens"] / value["requests"] == pytest.approx(51 / 4)
    assert value["per token p50"] > 9  # the stand-in sleeps 10 ms
    assert value["per token p50"] <= value["per token p99"]
    slow = {name: measure.median for name, measure in second.measures.items() if measure is not None}
    assert slow["ratio"] == pytest.approx(slow["output tokens"] / value["output tokens"])
    assert slow["largest batch"] == 1
    # The last of twelve waits for the eleven before it, the first for nobody.
    assert slow["first token p99"] > 100 * 1.5
    assert (tmp_path / "logs" / "one.log").is_file()


def test_a_run_ends_when_its_time_is_up(stand_in: Path, tmp_path: Path) -> None:
    systems = [Served("one", str(stand_in), ("--max-num-seqs", "2"))]
    # Two at a time, at least 10 ms a token: all would take six seconds, and on a busy machine one is still done in two.
    (row,) = bench_engine(systems, [None], Setting([Request(1, 3)] * 400, "mine", logs=tmp_path, seconds=2.0))
    value = {name: measure.median for name, measure in row.measures.items() if measure is not None}
    assert 0 < value["requests"] * 2.0 < 200
    assert 0 < value["output tokens"] < 200


def test_time_in_which_nothing_is_answered(stand_in: Path, tmp_path: Path) -> None:
    setting = Setting([Request(1, 400)] * 2, "mine", logs=tmp_path, seconds=1.5)
    (row,) = bench_engine([Served("one", str(stand_in))], [None], setting)
    assert row.measures["requests"] is None
    assert row.measures["output tokens"] is not None
    assert row.measures["output tokens"].median > 0


def test_tokens_are_counted_after_the_server_has_filled() -> None:
    loads = [client.Load(time, 1.0, 0.5, generated) for time, generated in ((0, 0), (1, 10), (2, 110), (4, 310))]
    assert generated_per_second(loads, 4.0) == 100
    with pytest.raises(RunError, match=r"0\.1 s are too few"):
        generated_per_second(loads[:1], 0.1)


def test_a_server_that_does_not_start_keeps_its_row(stand_in: Path, tmp_path: Path) -> None:
    systems = [Served("bad", str(stand_in), ("broken", "yes")), Served("good", str(stand_in))]
    bad, good = bench_engine(systems, [None], Setting(REQUESTS[:1], "mine", logs=tmp_path))
    assert bad.measures["output tokens"] is None
    assert bad.note == "vLLM didn't start: ValueError: this model is broken"
    assert good.measures["output tokens"] is not None
    assert good.measures["ratio"] is None


def test_a_refused_request_is_said(stand_in: Path, tmp_path: Path) -> None:
    setting = Setting([Request(1, 2), Request(1, 2), Request(1, 13)], "mine", logs=tmp_path)
    (row,) = bench_engine([Served("one", str(stand_in))], [None], setting)
    assert row.note == "The server refused a request: unlucky"


def test_a_budget_without_room(stand_in: Path) -> None:
    with pytest.raises(RunError, match="leave no room"):
        memory_options(1e-7, str(stand_in))
    assert memory_options(1e-5, str(stand_in)) == ["--kv-cache-memory-bytes", "9000"]


def test_nobody_there() -> None:
    with pytest.raises(RunError, match="No server answers"):
        client.get(1, "/health")


def test_percentiles() -> None:
    assert percentile([3.0], 99) == 3
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile(list(range(101)), 99) == 99


def test_the_error_that_tells() -> None:
    assert last_error("") == "it said nothing"
    assert last_error("INFO a\nException\nit died") == "it died"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from atomcli.formats.scheme import SCHEMES, KVFormat

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    parent, source = random_parent("llama", head_dim=32, hidden_size=128, intermediate_size=192)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_checkpoint(ours, source, SCHEMES["w8a8"], KVFormat("int4", "after_rope", True, True))
    parent.save_pretrained(theirs)
    words = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(VOCABULARY)}, "<0>"))
    for directory in (ours, theirs):
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    options = "--enforce-eager --dtype float32 --max-model-len 128 --max-num-seqs 4 --gpu-memory-utilization 0.05"
    setting = Setting(draw("paper", 6, scale=0.05), "paper", options=tuple(options.split()), logs=tmp_path)
    systems = [Served("bf16", str(theirs)), Served("atom", str(ours))]
    rows = bench_engine(systems, [0.02], setting)
    assert [row.note for row in rows] == ["", ""]
    room = [row.measures["KV room"].median for row in rows]  # type: ignore[union-attr]
    # fp32 keys and values of 32 channels take 256 bytes, ours 40; blocks of 128 tokens are whole.
    assert room[1] / room[0] == pytest.approx(256 / 40, rel=0.1)
    for row in rows:
        assert row.measures["output tokens"].median > 0  # type: ignore[union-attr]
        assert row.measures["largest batch"].median <= 4  # type: ignore[union-attr]
