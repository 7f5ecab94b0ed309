"""Accuracy with its uncertainty, as tables and plots."""

from collections.abc import Mapping, Sequence
from typing import Any

from atomcli.benchmarks.report import number
from atomcli.reporting.figures import Figure, Palette, axes
from atomcli.reporting.page import Grid, Section
from atomcli.units import byte_count


def section_of_divergence(document: Mapping[str, Any]) -> Section:
    """What `eval kld` measured."""
    parent, own = document["parent_token_perplexity"], document["token_perplexity"]
    rows = [
        ["token perplexity of the parent", _value(parent, document.get("parent_standard_error"))],
        ["token perplexity", _value(own, document.get("standard_error"))],
        ["their ratio", _value(document["perplexity_ratio"], document.get("perplexity_ratio_standard_error"))],
        ["mean KL divergence (nats)", _value(document["mean_kld"], document.get("mean_kld_standard_error"))],
        ["95 % of tokens are below", _value(document["kld_95"])],
        ["99 % of tokens are below", _value(document["kld_99"])],
        ["same top token", _share(document["top1_agreement"], document.get("top1_agreement_standard_error"))],
    ]
    return Section("Accuracy", _text_of(document), grid=Grid(["", "measured ± standard error"], rows))


def section_of_perplexities(document: Mapping[str, Any]) -> Section:
    """What `eval ppl` measured, a row a model."""
    models = document["models"]
    rows = [
        [
            model["name"],
            _value(model.get("token_perplexity"), model.get("standard_error")),
            _value(model.get("word_perplexity")),
            byte_count(model["weight_bytes"]) if model.get("weight_bytes") else "–",
        ]
        for model in models
    ]
    header = ["model", "token perplexity ± standard error", "word perplexity", "weights"]
    shown = [model for model in models if model.get("token_perplexity")]
    figures = []
    if shown:
        names = [model["name"] for model in shown]
        points = [(model["token_perplexity"], model.get("standard_error") or 0.0) for model in shown]
        figures.append(
            Figure(
                "perplexity",
                "Token perplexity with its standard error; lower is better.",
                lambda palette: _whiskers(palette, names, points, "token perplexity"),
            )
        )
    return Section("Accuracy", _text_of(document), figures, Grid(header, rows))


def section_of_tasks(document: Mapping[str, Any]) -> Section:
    """What `eval tasks` measured, a row a model and task."""
    results = document["results"]
    keys = list(dict.fromkeys(key for row in results for key in row))
    rows = [[_cell(row.get(key)) for key in keys] for row in results]
    return Section("Zero-shot accuracy", grid=Grid([key.replace("_", " ") for key in keys], rows))


def _text_of(document: Mapping[str, Any]) -> str:
    row = document["models"][0] if document.get("models") else document
    windows = f", {row['windows']} windows of {row['window_length']} tokens" if "windows" in row else ""
    return f"Measured on {document['text']}{windows}."


def _whiskers(palette: Palette, names: Sequence[str], points: Sequence[tuple[float, float]], label: str) -> Any:
    canvas, plot = axes(label, "", height=0.8 + 0.35 * len(names))
    for place, (value, error) in enumerate(points):
        plot.errorbar(value, place, xerr=error, fmt="o", capsize=3, color=palette.series[0])
    plot.set_yticks(range(len(names)), [name if len(name) < 32 else f"…{name[-31:]}" for name in names])
    plot.set_ylim(len(names) - 0.5, -0.5)
    return canvas


def _cell(value: Any) -> str:
    return _value(value) if isinstance(value, float) or value is None else str(value)


def _value(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "–"
    return number(value) if not error else f"{number(value)} ± {number(error, 2)}"


def _share(value: float, error: float | None) -> str:
    return f"{value:.2%}" if error is None else f"{value:.2%} ± {error:.2%}"
