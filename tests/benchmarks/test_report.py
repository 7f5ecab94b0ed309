"""One row type, three renderings that agree, numbers that say how sure they are."""

import csv
import io
import json
import math

import pytest

from atomcli.benchmarks.report import Measure, Row, environment, exact, measure, number, render, to_json, to_markdown
from atomcli.errors import UsageError

ROWS = [
    Row(
        {"model": "parent", "batch": 1}, {"decode": measure([10.0, 12.0, 11.0], "tokens/s"), "KV": exact(4096, "bytes")}
    ),
    Row(
        {"model": "a|b", "batch": 16}, {"decode": None, "KV": exact(1024, "bytes")}, "out of memory", {"new_tokens": 32}
    ),
]


def test_measure_is_median_and_quartiles() -> None:
    assert measure([5.0, 1.0, 2.0, 4.0, 3.0], "ms") == Measure(3.0, 2.0, 4.0, "ms", 5)
    assert measure([1.0, 2.0], "ms") == Measure(1.5, 1.25, 1.75, "ms", 2)
    assert measure([7.0], "ms") == exact(7.0, "ms")
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="a measure needs"):
            measure(bad, "ms")


def test_markdown_is_aligned_and_says_what_is_missing() -> None:
    assert to_markdown(ROWS) == (
        "| model  | batch | decode (tokens/s) | KV (bytes) | note          |\n"
        "|--------|-------|------------------:|-----------:|---------------|\n"
        "| parent | 1     |      11.00 ± 0.50 |      4,096 |               |\n"
        "| a\\|b   | 16    |                 – |      1,024 | out of memory |\n"
    )
    assert "note" not in to_markdown(ROWS[:1])


def test_csv_has_a_column_per_number() -> None:
    parent, other = csv.DictReader(io.StringIO(render(ROWS, "csv")))
    assert (parent["decode"], parent["decode_low"], parent["decode_high"]) == ("11.0", "10.5", "11.5")
    assert (parent["decode_unit"], parent["decode_samples"]) == ("tokens/s", "3")
    assert (other["decode"], other["note"], other["model"]) == ("", "out of memory", "a|b")


def test_json_holds_everything() -> None:
    document = json.loads(to_json(ROWS, {"device": "cpu"}))
    assert document["environment"] == {"device": "cpu"}
    assert document["rows"][0]["measures"]["decode"]["median"] == 11.0
    assert document["rows"][1] == {
        "labels": {"model": "a|b", "batch": 16},
        "measures": {"decode": None, "KV": {"median": 1024, "low": 1024, "high": 1024, "unit": "bytes", "samples": 1}},
        "note": "out of memory",
        "extra": {"new_tokens": 32},
    }
    assert json.loads(render(ROWS, "json"))["environment"]["torch"] == environment()["torch"]


def test_refuses_mixed_units_and_unknown_formats() -> None:
    with pytest.raises(ValueError, match="mixes the units"):
        to_markdown([Row({}, {"time": exact(1, "ms")}), Row({}, {"time": exact(1, "us")})])
    with pytest.raises(UsageError, match="'html' is none of md, csv, json"):
        render(ROWS, "html")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (7, "7"),
        (0.00123456, "0.001235"),
        (1.0, "1.000"),
        (12.345, "12.35"),
        (1234.5, "1,234"),
        (98765.4, "98,765"),
        (98123456, "98,123,456"),
        (-3.14159, "-3.142"),
        (9.9999, "10.00"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert number(value) == text
