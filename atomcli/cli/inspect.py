"""`atom inspect`: what is inside a checkpoint, per layer, and whether it is whole."""

from pathlib import Path
from typing import Annotated

import typer

from atomcli.cli.command import command
from atomcli.cli.console import Table, console
from atomcli.cli.reports import reportable
from atomcli.units import byte_count


@command
@reportable
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory that `atom quantize` wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every tensor again and check it.")] = False,
) -> None:
    """Show what is inside a checkpoint.

    Every layer with its scheme, bits per weight, bytes and error, and whether the files are whole.
    """
    from atomcli.checkpoint.contents import read_contents

    contents = read_contents(checkpoint)
    if verify:
        from atomcli.checkpoint.verify import verify_checkpoint

        verify_checkpoint(checkpoint)
    table = Table(["layer", "scheme", ">bits/weight", ">bytes", ">error"])
    for layer in contents.layers:
        error = "–" if layer.error is None else f"{layer.error:.3e}"
        table.add(layer.name, layer.scheme, f"{layer.bits_per_weight:.2f}", byte_count(layer.bytes), error)
    kept = sum(contents.kept.values())
    cache = contents.kv_cache
    document = {
        "checkpoint": checkpoint,
        "verified": verify,
        "parent": contents.report.get("parent"),
        "recipe": contents.report.get("recipe"),
        "bytes": contents.bytes,
        "bits_per_weight": contents.bits_per_weight,
        "quantized_parameters": contents.quantized_parameters,
        "kv_cache": cache,
        "layers": [
            {
                "name": layer.name,
                "scheme": layer.scheme,
                "bits_per_weight": layer.bits_per_weight,
                "bytes": layer.bytes,
                "error": layer.error,
            }
            for layer in contents.layers
        ],
        "kept": contents.kept,
    }
    console.result(
        document,
        table,
        "",
        f"quantized  {len(contents.layers)} layers, {byte_count(contents.quantized_bytes)}, "
        f"{contents.bits_per_weight:.3f} bits per weight",
        f"kept       {len(contents.kept)} tensors, {byte_count(kept)}",
        f"KV cache   {cache['element']}, {cache['position'].replace('_', ' ')}",
        f"total      {byte_count(contents.bytes)}",
        *(["every tensor was read and is what the manifest says"] if verify else []),
    )
