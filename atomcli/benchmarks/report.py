"""One row type for every bench, and its three renderings: Markdown for people, CSV for sheets, JSON for machines.

A number never travels alone: it carries its unit, its spread and how many samples it was taken from, and a row
carries a note for what a reader must know to compare it (which path ran, what could not be measured and why).
"""

import csv
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from atomcli.errors import UsageError
from atomcli.version import __version__

TableFormat = Literal["md", "csv", "json"]


@dataclass(frozen=True)
class Measure:
    """A measured number: median, lower and upper quartile, unit, and the number of samples behind them.

    Of a mean it holds the mean and one standard error either way.
    """

    median: float
    low: float
    high: float
    unit: str
    samples: int


@dataclass(frozen=True)
class Row:
    """One line of a bench: what was run (labels), what came out (measures), and what a reader must know (note).

    A measure of None is one that could not be taken; the note says why.
    """

    labels: Mapping[str, str | int | float]
    measures: Mapping[str, Measure | None]
    note: str = ""
    extra: Mapping[str, str | int | float] = field(default_factory=dict)  # JSON only: settings behind the row


def measure(values: Sequence[float], unit: str) -> Measure:
    """Median and quartiles (linear interpolation) of at least one finite sample, in `unit`."""
    if not values:
        raise ValueError("a measure needs at least one sample")
    ordered = sorted(values)
    if not all(math.isfinite(value) for value in ordered):
        raise ValueError(f"a measure needs finite samples, not {values}")
    return Measure(_quantile(ordered, 0.5), _quantile(ordered, 0.25), _quantile(ordered, 0.75), unit, len(ordered))


def mean(value: float, standard_error: float | None, unit: str, samples: int) -> Measure:
    """A mean over samples with its standard error, None where one sample gives none."""
    error = standard_error or 0.0
    return Measure(value, value - error, value + error, unit, samples)


def exact(value: float, unit: str) -> Measure:
    """A counted number (bytes, shapes): no spread, one sample."""
    return Measure(value, value, value, unit, 1)


def environment() -> dict[str, str]:
    """Where the numbers come from: device, processor, threads and the versions that decide speed."""
    import torch

    facts = {
        "atom": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "device": "cpu",
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts |= {"device": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
        facts["cuda"] = str(torch.version.cuda)
    return facts


def render(rows: Sequence[Row], form: TableFormat) -> str:
    """The rows as a table; raises UsageError for a format that is none of md, csv, json."""
    if form == "md":
        return to_markdown(rows)
    if form == "csv":
        return to_csv(rows)
    if form == "json":
        return to_json(rows, environment())
    raise UsageError(f"--format {form!r} is none of md, csv, json")


def to_markdown(rows: Sequence[Row]) -> str:
    """An aligned GitHub table; a spread below the rounding is left out, a note column appears when there is a note."""
    labels, measures, notes = _columns(rows)
    units = {name: _unit(rows, name) for name in measures}
    header = labels + [f"{name} ({units[name]})" if units[name] else name for name in measures]
    lines = [
        [str(row.labels.get(name, "")) for name in labels]
        + [_with_spread(row.measures.get(name)) for name in measures]
        + ([row.note] if notes else [])
        for row in rows
    ]
    return _markdown_table(header + (["note"] if notes else []), lines, numeric=range(len(labels), len(header)))


def to_csv(rows: Sequence[Row]) -> str:
    """One line per row; each measure as five columns: median, low, high, unit, samples."""
    labels, measures, _ = _columns(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("", "_low", "_high", "_unit", "_samples")
    writer.writerow(labels + [name + part for name in measures for part in parts] + ["note"])
    for row in rows:
        cells: list[object] = [row.labels.get(name, "") for name in labels]
        for name in measures:
            value = row.measures.get(name)
            cells += [value.median, value.low, value.high, value.unit, value.samples] if value else [""] * len(parts)
        writer.writerow([*cells, row.note])
    return out.getvalue()


def to_json(rows: Sequence[Row], where: Mapping[str, str]) -> str:
    """One document: {"environment": …, "rows": [{"labels", "measures", "note", "extra"}]}; None where not measured."""
    document = {
        "environment": dict(where),
        "rows": [
            {
                "labels": dict(row.labels),
                "measures": {name: asdict(value) if value else None for name, value in row.measures.items()},
                "note": row.note,
                "extra": dict(row.extra),
            }
            for row in rows
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[str], bool]:
    """Label names and measure names in order of first appearance, and whether any row has a note."""
    labels = list(dict.fromkeys(name for row in rows for name in row.labels))
    measures = list(dict.fromkeys(name for row in rows for name in row.measures))
    return labels, measures, any(row.note for row in rows)


def _unit(rows: Sequence[Row], name: str) -> str:
    units = {value.unit for row in rows if (value := row.measures.get(name))}
    if len(units) > 1:
        raise ValueError(f"column {name!r} mixes the units {', '.join(sorted(units))}")
    return units.pop() if units else ""


def _with_spread(value: Measure | None) -> str:
    if value is None:
        return "–"
    text = number(value.median)
    spread = max(value.high - value.median, value.median - value.low)
    return text if value.samples < 2 or not spread else f"{text} ± {number(spread, digits=2)}"


def number(value: float, digits: int = 4) -> str:
    """`value` to `digits` significant digits or to whole numbers; no exponents, thousands in groups of three."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    if isinstance(value, int) or (value == int(value) and abs(value) >= 10 ** (digits - 1)):
        return f"{int(value):,}"
    rounded = float(f"{value:.{digits - 1}e}")  # first: 9.9999 has one digit more before the point than after
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], numeric: range) -> str:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in [header, *lines]]
    widths = [max(len(line[column]) for line in escaped) for column in range(len(header))]

    def join(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if c in numeric else "-") for c, w in enumerate(widths)) + "|"
    return "\n".join([join(escaped[0]), rule, *map(join, escaped[1:])]) + "\n"


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _processor() -> str:
    """The processor's market name where Linux tells it, else its architecture."""
    from pathlib import Path

    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
