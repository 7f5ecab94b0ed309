"""What is measured after a checkpoint is made, written into its card; the manifest then covers the new card."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atomcli.checkpoint.card import CARD
from atomcli.checkpoint.files import read_json, unreadable, write_json, write_text
from atomcli.checkpoint.manifest import MANIFEST, read_manifest
from atomcli.errors import InputError

_BEGIN, _END = "<!-- atom eval kld -->", "<!-- end of atom eval kld -->"
_BEFORE = "## Use\n"


def record_divergence(directory: Path, text: str, row: Mapping[str, Any]) -> None:
    """Put what `atom eval kld` measured on `text` into a checkpoint's card, in place of what it said before.

    `row` is `Divergence.row()`. Raises InputError for a checkpoint without a card or a manifest.
    """
    manifest = read_manifest(directory).to_dict()
    path = directory / CARD
    if CARD not in manifest["files"]:
        raise InputError(f"{directory} has no model card", "Quantize again with this version of atom.")
    try:
        card = path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from error
    section = f"{_BEGIN}\n{_measured(text, row)}{_END}\n\n"
    found = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n\n", re.DOTALL)
    card = found.sub(lambda _: section, card) if found.search(card) else card.replace(_BEFORE, section + _BEFORE, 1)
    write_text(path, card)
    data = card.encode("utf-8")
    stored = read_json(directory / MANIFEST)
    stored["files"][CARD] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(directory / MANIFEST, stored)


def _measured(text: str, row: Mapping[str, Any]) -> str:
    def with_error(key: str, digits: int) -> str:
        error = row.get(f"{key}_standard_error")
        return f"{row[key]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    lines = {
        "KL divergence, nats a token": with_error("mean_kld", 4),
        "same most likely token": f"{row['top1_agreement']:.1%}",
        "token perplexity": f"{row['token_perplexity']:.3f} (parent {row['parent_token_perplexity']:.3f})",
        "perplexity ratio": with_error("perplexity_ratio", 4),
    }
    table = "".join(f"| {what} | {value} |\n" for what, value in lines.items())
    where = f"{text}, {row['windows']} windows of {row['window_length']} tokens"
    return f"## Measured\n\nBeside the parent, on {where}:\n\n| | |\n| --- | --- |\n{table}"
