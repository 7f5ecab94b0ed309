"""A compressed model in pictures: bits and error of every layer, and memory over the length of a context."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from atomcli.checkpoint.contents import Contents, Layer, read_contents
from atomcli.checkpoint.directory import CONFIG
from atomcli.checkpoint.files import read_json
from atomcli.formats.scheme import KVFormat
from atomcli.reporting.figures import Figure, Palette, axes
from atomcli.reporting.page import Grid, Section
from atomcli.units import byte_count

_BATCHES = (1, 16)
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as a token passes them


def sections_of_checkpoint(directory: Path) -> list[Section]:
    """What a checkpoint holds, read from its config, manifest and report; InputError when it is none."""
    contents = read_contents(directory)
    config = read_json(directory / CONFIG)
    return [_sizes(contents), _network(contents.layers), _memory(contents, config), _recipe(contents.report)]


def _sizes(contents: Contents) -> Section:
    kept = sum(contents.kept.values())
    before = 2 * contents.quantized_parameters
    rows = [
        ["quantized layers", f"{len(contents.layers)}", byte_count(before), byte_count(contents.quantized_bytes)],
        ["everything else", f"{len(contents.kept)} tensors", byte_count(kept), byte_count(kept)],
        ["all", "", byte_count(before + kept), byte_count(contents.bytes)],
    ]
    parent = contents.report.get("parent", {})
    lead = f"{contents.bits_per_weight:.3f} bits per weight, scales and outlier channels counted"
    if "name" in parent:
        lead += f"; made from {parent['name']} ({parent.get('architecture', 'of unknown architecture')})"
    return Section("Size", f"{lead}.", grid=Grid(["", "count", "in 16 bits", "here"], rows))


def _network(layers: Sequence[Layer]) -> Section:
    """The network as two pictures: one column a block, one row a kind of layer."""
    bits = Figure(
        "bits",
        "Stored bits per weight of every layer: a column for each block, a row for each kind of layer.",
        lambda palette: _picture(palette, _cells(layers, lambda layer: layer.bits_per_weight), "bits per weight"),
    )
    figures = [bits]
    if any(layer.error for layer in layers):
        figures.append(
            Figure(
                "error",
                "Relative error of every layer's output on calibration data; logarithmic.",
                lambda palette: _picture(
                    palette, _cells(layers, lambda layer: layer.error), "relative error", log=True
                ),
            )
        )
    worst = sorted((layer for layer in layers if layer.error), key=lambda layer: -(layer.error or 0.0))[:10]
    rows = [
        [layer.name, layer.scheme, f"{layer.bits_per_weight:.2f}", byte_count(layer.bytes), f"{layer.error:.2e}"]
        for layer in worst
    ]
    grid = Grid(["layer with the largest error", "scheme", "bits", "size", "error"], rows) if rows else None
    lead = "Where the bits went and what they cost; experts of a layer are shown as their mean."
    return Section("The network", lead, figures, grid)


def _cells(layers: Sequence[Layer], value: Any) -> dict[tuple[str, int], float]:
    """Mean value by (kind of layer, block), for layers inside a block that have one."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for layer in layers:
        parts = layer.name.split(".")
        index = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if index is not None and value(layer):
            kind = ".".join(part for part in parts[index + 1 :] if not part.isdigit())
            found[kind, int(parts[index])].append(value(layer))
    return {place: sum(values) / len(values) for place, values in found.items()}


def _picture(palette: Palette, cells: Mapping[tuple[str, int], float], label: str, log: bool = False) -> Any:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    kinds = sorted({kind for kind, _ in cells}, key=_place)
    blocks = sorted({block for _, block in cells})
    values = [[cells.get((kind, block), float("nan")) for block in blocks] for kind in kinds]
    low, high = min(cells.values()), max(cells.values())
    norm = LogNorm(low, max(high, low * 1.01)) if log else Normalize(min(low, 4.0), max(high, low + 1.0))
    canvas, plot = axes("block", "", height=0.9 + 0.24 * len(kinds))
    plot.grid(visible=False)
    mesh = plot.pcolormesh(blocks, range(len(kinds)), values, norm=norm, cmap="viridis", edgecolors="none")
    plot.set_yticks(range(len(kinds)), kinds)
    plot.invert_yaxis()
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.colorbar(mesh, ax=plot, label=label).outline.set_edgecolor(palette.grid)
    return canvas


def _place(kind: str) -> tuple[int, str]:
    """Where a token meets this kind of layer in a block; kinds of no known place come last, by name."""
    last = kind.rpartition(".")[2]
    return (_ORDER.index(last) if last in _ORDER else len(_ORDER)), kind


def _memory(contents: Contents, config: Mapping[str, Any]) -> Section:
    """Weights and cache over the length of a context, beside those of the parent in 16 bits."""
    cache = KVFormat(**contents.kv_cache)
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    vectors = 2 * heads * int(config["num_hidden_layers"])
    parent_bytes = 2 * contents.quantized_parameters + sum(contents.kept.values())
    longest = int(config.get("max_position_embeddings", 4096))
    lengths = [length for length in (2**power for power in range(7, 24)) if length < longest] + [longest]

    def draw(palette: Palette) -> Any:
        canvas, plot = axes("tokens of context", "")
        for batch, line in zip(_BATCHES, ("-", "--"), strict=True):
            for name, weights, vector, color in (
                ("16 bits", parent_bytes, 2 * width, palette.series[7]),
                ("compressed", contents.bytes, cache.vector_bytes(width), palette.series[0]),
            ):
                totals = [weights + batch * length * vectors * vector for length in lengths]
                plot.plot(lengths, totals, line, color=color, label=f"{name}, batch {batch}")
        plot.set_xscale("log", base=2)
        plot.set_ylim(bottom=0)
        plot.xaxis.set_major_formatter(lambda length, _: f"{length / 1024:g}k" if length >= 1024 else f"{length:g}")
        plot.yaxis.set_major_formatter(lambda size, _: byte_count(size))
        plot.legend()
        return canvas

    rows = [
        [
            f"{length:,}",
            byte_count(parent_bytes + length * vectors * 2 * width),
            byte_count(contents.bytes + length * vectors * cache.vector_bytes(width)),
        ]
        for length in lengths[-6:]
    ]
    lead = (
        f"Weights and KV cache, computed from the stored sizes: a token takes {vectors * cache.vector_bytes(width):,} "
        f"bytes of cache here ({cache.element}), {vectors * 2 * width:,} in 16 bits."
    )
    figure = Figure("memory", "Weights and cache of a batch, over the context that each sequence has.", draw)
    return Section("Memory", lead, [figure], Grid(["context, batch 1", "in 16 bits", "here"], rows))


def _recipe(report: Mapping[str, Any]) -> Section:
    """The recipe as it was resolved, and what made the checkpoint."""
    facts = {key: report[key] for key in ("recipe", "calibration", "seed", "device", "versions") if key in report}
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return Section("Recipe", "Everything that decided what this checkpoint is.", details=text)
