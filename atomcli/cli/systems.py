"""The models that a bench compares, by the words on the command line."""

from functools import partial
from typing import TYPE_CHECKING

from atomcli.errors import UsageError

if TYPE_CHECKING:
    from atomcli.benchmarks.systems import System
    from atomcli.runtime.fused import FusedModel


def systems(
    checkpoint: str | None,
    against: str | None,
    shape: str | None,
    blocks: int | None,
    w8a8: bool,
    device: str | None,
) -> "list[System]":
    """The parent first, then W8A8 if asked for, then the checkpoint; or all three with made-up weights of a shape.

    `blocks` is another depth of the shape.
    Raises UsageError unless there is either a checkpoint or a shape.
    """
    from transformers import CONFIG_MAPPING

    from atomcli.benchmarks import systems as made
    from atomcli.benchmarks.parents import parent_config
    from atomcli.cli.models import check_models
    from atomcli.runtime.device import choose_device

    if (checkpoint is None) == (shape is None):
        raise UsageError("Name either a CHECKPOINT or a --shape", "atom bench model --shape llama-2-7b")
    target = choose_device(device)
    if shape is not None:
        config = parent_config(shape, blocks)
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        return [
            made.System(f"{shape} {name}", partial(made.made_up, parsed, *formats, target))
            for name, formats in made.FORMATS.items()
        ]
    assert checkpoint is not None
    names = [checkpoint] if against is None else [against, checkpoint]
    check_models(names, device)
    found = [made.System(name, partial(_load, name, device)) for name in names]
    if w8a8:
        found.insert(len(found) - 1, made.System("W8A8", partial(_same_shape, names[0], device)))
    return found


def _load(name: str, device: str | None) -> "FusedModel":
    """A model in the fused runtime; what lies in fp32 or fp16 is timed in bfloat16, as it would be served."""
    import torch

    from atomcli.cli.models import open_model
    from atomcli.runtime.fused import FusedModel

    return FusedModel.of(open_model(name, device).model.to(torch.bfloat16))


def _same_shape(name: str, device: str | None) -> "FusedModel":
    """The shape of a model in W8A8, with made-up weights."""
    from pathlib import Path

    from atomcli.benchmarks.systems import FORMATS, made_up
    from atomcli.checkpoint.contents import is_checkpoint
    from atomcli.checkpoint.source import open_source
    from atomcli.runtime.device import choose_device
    from atomcli.runtime.saved import read_config

    path = Path(name).expanduser()
    config = read_config(path) if is_checkpoint(path) else open_source(name).config
    return made_up(config, *FORMATS["W8A8"], choose_device(device))
