"""`atom plan`: sizes for nothing, a plan for a budget, and `quantize --plan` that follows it."""

import json
import math
import shlex

import pytest


@pytest.fixture
def text_options(quantize_options):
    return quantize_options[:6]


@pytest.fixture
def calibrated(atom, tiny_model, text_options, tmp_path):
    assert atom("calibrate", tiny_model, "-o", tmp_path / "calibration", *text_options).code == 0
    return ["--calibration", tmp_path / "calibration", *text_options]


CANDIDATES = [word for name in ("w4a8-g16-o16", "w4a8-g16-o0", "w8a8", "w16a16") for word in ("--candidate", name)]


def test_without_a_budget_it_shows_sizes_and_spends_nothing(atom, tiny_model, tiny_checkpoint, quantize_options):
    outcome = atom("plan", tiny_model, *quantize_options, "--json")
    document = json.loads(outcome.out)
    made = json.loads(atom("inspect", tiny_checkpoint, "--json").out)
    assert document["kld"] is None
    # Nobody knows before the statistics whether o's order can be folded into v's rows; it can't here.
    assert document["bytes"] == made["bytes"]
    assert document["bits_per_weight"] == pytest.approx(made["bits_per_weight"])


def test_measured_it_says_what_the_run_takes_and_leaves_nothing(
    atom, tiny_model, tiny_checkpoint, quantize_options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    outcome = atom("plan", tiny_model, *quantize_options, "--measure", "--json")
    assert outcome.code == 0, outcome.err
    run = json.loads(outcome.out)["run"]
    assert run["seconds"] > 0
    assert run["host_bytes"] > 1e8  # Python and torch alone
    assert run["gpu_bytes"] is None
    assert run["disk_bytes"] >= json.loads(atom("inspect", tiny_checkpoint, "--json").out)["bytes"]
    assert not list(tmp_path.glob("atom-plan-*"))


def test_a_plan_is_printed_and_followed(atom, tiny_model, quantize_options, calibrated, tmp_path, snapshot):
    shape = ["--outliers", 16, "--group", 16, "--bits-per-weight", 7, *CANDIDATES]
    outcome = atom("plan", tiny_model, *calibrated, *shape, "-o", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    assert "predicted KLD" in outcome.out
    again = atom("plan", tiny_model, *calibrated, *shape, "--json")
    assert "sensitivities" not in again.err  # the second plan is free
    planned = json.loads(again.out)
    assert planned["bits_per_weight"] <= 7
    assert [point["kld"] for point in planned["frontier"]] == sorted(
        (point["kld"] for point in planned["frontier"]), reverse=True
    )
    (next_command,) = [line for line in outcome.err.splitlines() if line.startswith("next: atom quantize")]
    for number, words in enumerate((shlex.split(next_command)[3:], [tiny_model, *calibrated, *shape])):
        out = tmp_path / f"out-{number}"
        done = atom("quantize", *words, "-o", out)
        assert done.code == 0, done.err
        assert "the plan predicted" in done.err
        made = json.loads(atom("inspect", out, "--json").out)
        assert {layer["name"]: layer["scheme"] for layer in made["layers"]} == {
            name: scheme for name, scheme in planned["linears"].items() if scheme is not None
        }
        assert made["bytes"] == planned["bytes"]
    report = json.loads((tmp_path / "out-0" / "atom_report.json").read_text())
    assert report["plan"]["kld"] == pytest.approx(planned["kld"])


def _costs(model, path, bytes_of):
    """Write a table as `atom bench gemm --json` does, a nanosecond for each byte of a weight; its shapes by linear."""
    config = json.loads((model / "config.json").read_text())
    hidden, between, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    shapes |= {"o_proj": (hidden, queries), "down_proj": (hidden, between)}
    shapes |= {"gate_proj": (between, hidden), "up_proj": (between, hidden)}
    rows = [
        {
            "labels": {"N": n, "K": k, "M": 16, "kernel": kernel},
            "measures": {"time": {"median": n * k * size / 1000, "unit": "µs"}},
        }
        for n, k in sorted(set(shapes.values()))
        for kernel, size in bytes_of.items()
    ]
    path.write_text(json.dumps({"rows": rows}))
    return shapes


def test_measured_products_give_a_plan_its_time(atom, tiny_model, calibrated, tmp_path):
    costs = tmp_path / "gemm.json"
    shapes = _costs(tiny_model, costs, {"cuBLAS bf16": 2, "atom w8a8 + quantize": 1})
    command = ["plan", tiny_model, *calibrated, "--outliers", 16, "--group", 16, "--costs", costs]
    command += ["--candidate", "w8a8", "--candidate", "w16a16"]
    by_size = json.loads(atom(*command, "--bits-per-weight", 9, "--json").out)
    area = {name: math.prod(shapes[name.rsplit(".", 1)[-1]]) for name in by_size["linears"]}
    expected = sum(area[name] * (2 if scheme is None else 1) for name, scheme in by_size["linears"].items()) / 1000
    assert by_size["microseconds"] == pytest.approx(expected)
    assert by_size["frontier"][0]["microseconds"] == pytest.approx(sum(area.values()) / 1000)
    shown = atom(*command, "--latency", by_size["microseconds"]).out
    assert f"time             {by_size['microseconds']:.1f} µs of products at 16 tokens" in shown
    assert [line for line in shown.splitlines() if "predicted KLD" in line][-1].split()[-1] == "µs"


def test_a_candidate_that_was_not_timed_is_named_before_anything_is_measured(atom, tiny_model, calibrated, tmp_path):
    _costs(tiny_model, tmp_path / "gemm.json", {"cuBLAS bf16": 2})
    command = ["plan", tiny_model, *calibrated, "--outliers", 16, "--group", 16, "--memory", "1GB"]
    outcome = atom(*command, "--costs", tmp_path / "gemm.json", "--candidate", "w8a8")
    assert outcome.code == 1
    assert "has no time of atom w8a8 + quantize" in outcome.err
    assert not list((tmp_path / "calibration").glob("sensitivities-*"))


def test_a_plan_of_another_recipe_is_refused(atom, tiny_model, calibrated, tmp_path):
    shape = ["--outliers", 16, "--group", 16, "--bits-per-weight", 7, *CANDIDATES]
    assert atom("plan", tiny_model, *calibrated, *shape, "-o", tmp_path / "plan.json").code == 0
    outcome = atom(
        "quantize", tiny_model, "-o", tmp_path / "out", *calibrated, "--outliers", 8, "--plan", tmp_path / "plan.json"
    )
    assert outcome.code == 1
    assert "was made for another recipe" in outcome.err


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (["--bits-per-weight", 3], "bits_per_weight 3 can't be met"),
        (["--memory", "20kB"], "memory 20000 bytes can't be met"),
        (["--memory", "20 elephants"], "select.memory is '20 elephants'"),
        (["--bits-per-weight", 5, "--max-kld", 0.1], "exactly one of"),
        (["--latency", 100], "latency needs costs"),
        (["--max-kld", 1e-9, "--candidate", "w4a8-g16-o16"], "max_kld 1e-09 can't be met"),
    ],
)
def test_a_budget_that_can_not_be(budget, message, atom, tiny_model, calibrated):
    outcome = atom("plan", tiny_model, *calibrated, "--outliers", 16, "--group", 16, *budget)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_the_nearest_budget_that_is_named_can_be_met(atom, tiny_model, calibrated):
    command = ["plan", tiny_model, *calibrated, "--outliers", 16, "--group", 16, "--memory"]
    refused = atom(*command, "20kB").err
    nearest = refused.split("nearest budget that can is ")[1].split()[0]
    assert atom(*command, nearest).code == 0
    assert atom(*command, int(nearest) - 1).code == 2


def test_the_frontier_as_a_plot(atom, tiny_model, calibrated, tmp_path):
    pytest.importorskip("matplotlib")
    command = ["plan", tiny_model, "--outliers", 16, "--group", 16, "--plot", tmp_path / "curve.png"]
    assert atom(*command).code == 2
    assert atom(*command, *calibrated).code == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_calibration_that_is_not_there_is_no_reason_to_make_one(atom, tiny_model, text_options, tmp_path):
    mistyped = tmp_path / "calibratoin"
    outcome = atom("plan", tiny_model, "--calibration", mistyped, *text_options, "--bits-per-weight", 7)
    assert outcome.code == 1
    assert f"{mistyped} is no calibration" in outcome.err
    assert not [*tmp_path.iterdir()]
