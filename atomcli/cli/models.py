"""Models by the name a person types: a checkpoint of atom, or any parent that a source can read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomcli.checkpoint.contents import is_checkpoint, read_contents, refuse_unfinished
from atomcli.cli.console import console
from atomcli.errors import UsageError


@dataclass
class OpenModel:
    """A model ready to run, its tokenizer, the bytes of its weights and the bits per weight of its linears."""

    name: str
    model: Any
    tokenizer: Any
    weight_bytes: int
    bits_per_weight: float

    def sizes(self) -> dict[str, Any]:
        return {"weight_bytes": self.weight_bytes, "bits_per_weight": self.bits_per_weight}


def open_model(name: str, device: str | None = None) -> OpenModel:
    """Loads a checkpoint or a parent onto a device; by default a GPU where there is one."""
    from atomcli.runtime import decoder
    from atomcli.runtime.device import choose_device

    target = choose_device(device)
    path = Path(name).expanduser()
    if is_checkpoint(path):
        from atomcli.checkpoint.directory import load_tokenizer

        contents = read_contents(path)
        model, tokenizer = decoder.load_checkpoint(path), load_tokenizer(path)
        return OpenModel(name, model.to(target), tokenizer, contents.bytes, contents.bits_per_weight)
    from atomcli.checkpoint.source import open_source

    source = open_source(name)
    tokenizer = source.tokenizer()
    model = decoder.load_parent(source)
    element = source.dtype.itemsize
    size = element * sum(parameter.numel() for parameter in model.parameters())
    return OpenModel(name, model.to(target), tokenizer, size, 8.0 * element)


def check_models(names: list[str], device: str | None) -> None:
    """Raises, before hours are spent on the first of several models, what a glance tells about any of them."""
    from atomcli.checkpoint.source import open_source
    from atomcli.runtime.device import choose_device

    choose_device(device)
    for name in names:
        path = Path(name).expanduser()
        refuse_unfinished(path)
        if is_checkpoint(path):
            read_contents(path)
        else:
            open_source(name)


def parent_of(checkpoint: str) -> str:
    """The parent that a checkpoint's report names; UsageError when it names none."""
    path = Path(checkpoint).expanduser()
    parent = read_contents(path).report.get("parent", {}) if is_checkpoint(path) else {}
    if not parent.get("name"):
        raise UsageError(f"{checkpoint} doesn't say which parent it has", "Name it with --against PARENT")
    console.note(f"parent: {parent['name']} (from the checkpoint's report)")
    return str(parent["name"])


def warn_of_another_parent(checkpoint: str, parent: str) -> None:
    """Says so when `parent` is not the model that a checkpoint was made from, by the fingerprint in its report."""
    path = Path(checkpoint).expanduser()
    made_from = read_contents(path).report.get("parent", {}) if is_checkpoint(path) else {}
    if not made_from.get("fingerprint"):
        return
    from atomcli.checkpoint.source import open_source

    named = Path(parent).expanduser()
    if is_checkpoint(named) or open_source(parent).fingerprint() != made_from["fingerprint"]:
        console.warn(
            f"{parent} is not the parent of {checkpoint}, which was made from {made_from.get('name')} "
            f"(fingerprint {made_from['fingerprint'][:12]}): what follows is the distance from another model"
        )
