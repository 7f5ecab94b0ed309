"""Which sections a command's document brings, and that their numbers are the document's."""

import json
from typing import Any

import pytest

from atomcli.benchmarks.report import Row, environment, measure, to_json
from atomcli.reporting.document import sections_of
from atomcli.reporting.figures import PAPER


def bench_document(rows: list[Row], device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    return json.loads(to_json(rows, environment() | {"device": device}))


def gemm_row(kernel: str, tokens: int, time: float) -> Row:
    values = {
        "time": measure([time, time * 1.1, time * 0.9], "µs"),
        "TOPS": measure([tokens / time], "TOPS"),
        "GB/s": measure([1000 / time], "GB/s"),
        "vs bf16": measure([2.0], "×"),
    }
    return Row({"N": 64, "K": 32, "M": tokens, "kernel": kernel}, values)


def lines_of(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    (plot,) = figure.draw(PAPER).axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in plot.get_lines()}


def test_a_gemm_bench_is_drawn_under_the_ceilings_of_its_card() -> None:
    rows = [gemm_row(kernel, tokens, 10.0) for kernel in ("ours", "cuBLAS") for tokens in (1, 4096)]
    section, _ = sections_of(bench_document(rows))
    roofline, time, ratio = section.figures
    lines = lines_of(roofline)
    assert lines.keys() == {"ours", "cuBLAS", "H100: memory, 8-bit arithmetic"}
    assert lines["ours"] == ([1.0, 4096.0], [0.1, 409.6])
    ceiling = lines["H100: memory, 8-bit arithmetic"]
    assert ceiling[1][0] == pytest.approx(3.0 * ceiling[0][0])  # 3 TB/s, and TOPS over operations per byte
    assert ceiling[1][-1] == pytest.approx(1930)
    assert lines_of(time)["ours"] == ([1, 4096], [10.0, 10.0])
    assert ratio.name == "vs-bf16"
    assert section.grid is not None
    assert section.grid.header == ["N", "K", "M", "kernel", "time (µs)", "TOPS", "GB/s", "vs bf16 (×)"]
    assert section.grid.rows[0][4] == "10.00 ± 0.50"


def test_an_unknown_card_gets_no_ceiling() -> None:
    section, _ = sections_of(bench_document([gemm_row("ours", 1, 5.0)], "some card"))
    assert lines_of(section.figures[0]).keys() == {"ours"}


def test_what_could_not_be_measured_keeps_its_row_and_its_note() -> None:
    rows = [
        Row({"M": 1, "kernel": "a"}, {"time": measure([2.0], "µs")}),
        Row({"M": 1, "kernel": "b"}, {"time": None}, "no card"),
    ]
    section, _ = sections_of(bench_document(rows))
    assert section.grid is not None
    assert [row[-2:] for row in section.grid.rows] == [["2.000", ""], ["–", "no card"]]


def test_a_divergence_with_a_gate_that_was_not_met() -> None:
    document = {
        "text": "demo",
        "windows": 2,
        "window_length": 16,
        "parent_token_perplexity": 20.0,
        "token_perplexity": 25.0,
        "perplexity_ratio": 1.25,
        "perplexity_ratio_standard_error": 0.01,
        "mean_kld": 0.3,
        "kld_95": 1.0,
        "kld_99": 2.0,
        "top1_agreement": 0.75,
        "top1_agreement_standard_error": 0.004,
        "error": {"what": "mean KLD 0.3 is above 0.2"},
    }
    failed, accuracy, where = sections_of(document)
    assert failed.lead == "mean KLD 0.3 is above 0.2"
    assert accuracy.lead == "Measured on demo, 2 windows of 16 tokens."
    assert accuracy.grid is not None
    assert ["their ratio", "1.250 ± 0.010"] in list(accuracy.grid.rows)
    assert ["same top token", "75.00% ± 0.40%"] in list(accuracy.grid.rows)
    assert where.title == "Where it ran"


def test_perplexities_are_drawn_with_their_errors() -> None:
    models = [
        {"name": name, "token_perplexity": value, "standard_error": 0.5} for name, value in (("a", 20.0), ("b", 30.0))
    ]
    section, _ = sections_of({"text": "demo", "models": models})
    (figure,) = section.figures
    (plot,) = figure.draw(PAPER).axes
    assert [label.get_text() for label in plot.get_yticklabels()] == ["a", "b"]
    spans = [collection.get_segments()[0][:, 0].tolist() for collection in plot.collections]
    assert spans == [[19.5, 20.5], [29.5, 30.5]]
