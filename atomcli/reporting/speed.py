"""Speed beside its limits, as tables and plots: what the rows of any bench hold."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from atomcli.benchmarks.report import number
from atomcli.reporting.figures import Figure, Palette, axes
from atomcli.reporting.page import Grid, Section

_TELLING = ("time", "vs bf16", "prefill", "decode")  # of a bench with many measures, those that are drawn

Measured = Mapping[str, Any]  # a row of a bench's document: labels, measures, note


def section_of_bench(document: Mapping[str, Any]) -> Section:
    """What a bench measured: its table, and plots of the measures that say most."""
    rows: Sequence[Measured] = document["rows"]
    labels = list(dict.fromkeys(name for row in rows for name in row["labels"]))
    measures = list(dict.fromkeys(name for row in rows for name in row["measures"]))
    titles = {name: _title(rows, name) for name in measures}
    notes = any(row["note"] for row in rows)
    cells = [
        [
            *(str(row["labels"].get(name, "")) for name in labels),
            *(_spread(row["measures"].get(name)) for name in measures),
            *([row["note"]] if notes else []),
        ]
        for row in rows
    ]
    figures = [_roofline(rows, document["environment"])] if {"TOPS", "GB/s"} <= {*measures} else []
    telling = [name for name in measures if name in _TELLING] or measures[:2]
    figures += [_curves(rows, labels, name, titles[name]) for name in telling]
    device = document["environment"].get("device", "an unnamed device")
    lead = f"Medians with the wider half of the quartile range, on {device}."
    return Section("Speed", lead, figures, Grid([*labels, *titles.values(), *(["note"] if notes else [])], cells))


def _roofline(rows: Sequence[Measured], environment: Mapping[str, str]) -> Figure:
    """Operations per second over operations per byte, under the measured ceilings of the card."""
    from atomcli.benchmarks.gemm import INT8_PEAK, MEMORY_BANDWIDTH

    card = next((name for name in INT8_PEAK if name in environment.get("device", "")), None)

    def draw(palette: Palette) -> Any:
        canvas, plot = axes("operations per byte moved", "TOPS")
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            tops, rate = row["measures"].get("TOPS"), row["measures"].get("GB/s")
            if tops and rate:
                intensity = 1e3 * tops["median"] / rate["median"]
                points[str(row["labels"].get("kernel", ""))].append((intensity, tops["median"]))
        for name, pairs in points.items():
            plot.plot(*zip(*pairs, strict=True), "o", label=name)
        if card is not None and points:
            reach = [x for pairs in points.values() for x, _ in pairs]
            ridge = INT8_PEAK[card] / MEMORY_BANDWIDTH[card]
            ceiling = [min(reach) / 2, ridge, max(*reach, ridge) * 2]
            plot.plot(
                ceiling,
                [min(MEMORY_BANDWIDTH[card] * x, INT8_PEAK[card]) / 1e12 for x in ceiling],
                color=palette.ink,
                linewidth=1,
                label=f"{card}: memory, 8-bit arithmetic",
            )
        plot.set_xscale("log")
        plot.set_yscale("log")
        plot.legend()
        return canvas

    return Figure("roofline", "Each product under what the card's memory and arithmetic allow, both as measured.", draw)


def _curves(rows: Sequence[Measured], labels: Sequence[str], measure: str, title: str) -> Figure:
    """A measure over the label that changes most, a line for every setting of the others."""
    numeric = [name for name in labels if all(isinstance(row["labels"].get(name), int | float) for row in rows)]
    along = max(numeric, key=lambda name: len({row["labels"][name] for row in rows}), default=None)
    varying = [name for name in labels if name != along and len({str(row["labels"].get(name)) for row in rows}) > 1]
    lines: dict[str, list[tuple[Any, float]]] = defaultdict(list)
    for place, row in enumerate(rows):
        if value := row["measures"].get(measure):
            name = ", ".join(str(row["labels"].get(label)) for label in varying)
            lines[name].append((row["labels"][along] if along else place, value["median"]))

    def draw(palette: Palette) -> Any:
        canvas, plot = axes(along or "row", title)
        for name, points in lines.items():
            plot.plot(*zip(*sorted(points), strict=True), "o-", label=name or measure)
        positive = [point for points in lines.values() for point in points]
        if positive and max(x for x, _ in positive) > 8 * max(1e-9, min(x for x, _ in positive)):
            plot.set_xscale("log", base=2)
            plot.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        if positive and max(y for _, y in positive) > 20 * max(1e-9, min(y for _, y in positive)):
            plot.set_yscale("log")
        if 1 < len(lines) <= 10:
            plot.legend()
        return canvas

    name = measure.replace("/", "-per-").replace(" ", "-")
    return Figure(name, f"{measure[:1].upper()}{measure[1:]} over {along or 'the rows'}.", draw)


def _title(rows: Sequence[Measured], name: str) -> str:
    """A measure's name with its unit, where that says more than the name."""
    unit = next((value["unit"] for row in rows if (value := row["measures"].get(name))), "")
    return f"{name} ({unit})" if unit and unit != name else name


def _spread(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    text = number(value["median"])
    half = max(value["high"] - value["median"], value["median"] - value["low"])
    return text if value["samples"] < 2 or not half else f"{text} ± {number(half, 2)}"
