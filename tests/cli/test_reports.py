"""--report and --figures: every result has a page, also one that failed its gate."""

import json

import pytest

from atomcli.benchmarks.report import number


def test_a_checkpoint_and_its_divergence_on_one_page(atom, tiny_model, tiny_checkpoint, text_file, tmp_path):
    report, figures = tmp_path / "kld.html", tmp_path / "figures"
    outcome = atom(
        "eval", "kld", tiny_checkpoint, "--against", tiny_model, "--data", text_file, "--window-length", 64,
        "--windows", 4, "--report", report, "--figures", figures, "--json",
    )  # fmt: skip
    assert outcome.code == 0
    measured = json.loads(outcome.out)
    page = report.read_text()
    assert number(measured["perplexity_ratio"]) in page
    assert "model.layers.1.mlp.down_proj" in page
    assert "rounding: gptq" in page
    assert str(report) not in page  # the title is the command, without where its page went
    assert {file.name for file in figures.iterdir()} >= {"bits.svg", "bits.png", "error.svg", "memory.png"}


def test_a_gate_that_was_not_met_has_its_page(atom, tiny_model, tiny_checkpoint, text_file, tmp_path):
    report = tmp_path / "kld.html"
    outcome = atom(
        "eval", "kld", tiny_checkpoint, "--against", tiny_model, "--data", text_file, "--window-length", 64,
        "--windows", 2, "--max-kld", 0, "--report", report,
    )  # fmt: skip
    assert outcome.code == 1
    assert "<h2>Failed</h2>" in report.read_text()


def test_a_result_is_still_one_document(atom, tiny_checkpoint, tmp_path):
    outcome = atom("inspect", tiny_checkpoint, "--report", tmp_path / "r.html", "--json", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["layers"]


@pytest.mark.parametrize("name", ["report.pdf", "no/such/directory/r.html"])
def test_a_page_that_can_not_be_written_is_refused_before_the_work(atom, tmp_path, name):
    outcome = atom("quantize", "no-model", "--report", tmp_path / name)
    assert outcome.code == 2
    assert "--report" in outcome.err
