"""The model card: README.md of a checkpoint, with the metadata of the Hugging Face Hub and what was measured.

It says nothing that the files beside it don't: equal checkpoints have equal cards, byte for byte.
https://huggingface.co/docs/hub/model-cards
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from atomcli.units import byte_count

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a name that is no Hub id stands for.
_KNOWN = {"demo": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def base_model(name: str) -> str | None:
    """The Hub id of a model by the name that was typed; None for a directory or a file of one's own."""
    if name in _KNOWN:
        return _KNOWN[name]
    return name if _HUB_ID.fullmatch(name) and not Path(name).expanduser().exists() else None


def card(
    parent: Mapping[str, Any], summary: Sequence[tuple[str, str]], tags: Sequence[str], use: str, notes: str
) -> str:
    """A card: metadata with `tags`, a table of `summary` (what, value), how the model is used, and notes.

    parent: name as it was typed, architecture, and base_model, its Hub id or None.
    """
    name, base = str(parent["name"]), parent.get("base_model")
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base is not None:
        metadata |= {"base_model": base, "base_model_relation": "quantized"}
    metadata["tags"] = list(tags)
    title = (base or name).rstrip("/").rpartition("/")[2]
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{title}`"
    rows = "\n".join(f"| {what} | {value} |" for what, value in summary)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {title}, compressed by atom",
        f"{origin} ({parent['architecture']}), quantized after training.",
        f"| | |\n| --- | --- |\n{rows}",
        use.strip(),
        notes.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def checkpoint_card(
    parent: Mapping[str, Any],
    quantization: Mapping[str, Any],
    recipe: Mapping[str, Any],
    calibration: Mapping[str, Any],
    size: Mapping[str, float],
    proof: Mapping[str, float],
) -> str:
    """The card of a checkpoint of atom.

    `parent` has a fingerprint, too, `size` has bytes and bits_per_weight, `proof` kld, agreement and tokens.
    """
    used = sorted({entry["scheme"] for entry in quantization["linears"].values()})
    cache = quantization["kv_cache"]
    summary = [
        ("schemes", ", ".join(f"`{name}`" for name in used)),
        ("weights", ", ".join(sorted({_numbers(quantization["schemes"][name]["weights"]) for name in used}))),
        ("activations", ", ".join(sorted({_numbers(quantization["schemes"][name]["activations"]) for name in used}))),
        ("KV cache", "16 bits" if cache["element"] == "float" else cache["element"]),
        ("size of the weights", byte_count(size["bytes"])),
        ("bits per weight, quantized layers", f"{size['bits_per_weight']:.3f}"),
        ("KL divergence from the parent", f"{proof['kld']:.4f} nats a token, on {proof['tokens']} tokens"),
        ("same most likely token", f"{proof['agreement']:.1%} of them"),
        ("recipe", f"`{recipe['name']}`"),
        (
            "calibration",
            f"{calibration['samples']} sequences of {calibration['sequence_length']} tokens of "
            f"{recipe['calibration']['dataset']}",
        ),
        ("parent's fingerprint", f"`{parent['fingerprint'][:16]}`"),
    ]
    notes = (
        "The divergence is of the calibration text's beginning and compares builds; `atom eval kld .` measures on text "
        "that was held out. `atom inspect . --verify` checks every file, `atom_report.json` has every layer."
    )
    return card(parent, summary, ["atom", "quantized"], _USE, notes)


_USE = """
## Use

```python
import atomcli  # pip install atomcli; teaches transformers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_MODEL")
tokenizer = AutoTokenizer.from_pretrained("THIS_MODEL")
```

```sh
pip install atomcli vllm   # the plugin that reads the format comes with atomcli
vllm serve THIS_MODEL
```
"""


def _numbers(format: Mapping[str, Any]) -> str:
    """A format of schemes in words: `int4 in groups of 128`."""
    if format["element"] == "float":
        return "16 bits"
    return format["element"] if format["group"] is None else f"{format['element']} in groups of {format['group']}"
