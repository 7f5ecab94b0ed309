"""From what a command says under --json to the sections of its page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atomcli.checkpoint.contents import is_checkpoint
from atomcli.reporting import accuracy, model, speed
from atomcli.reporting.page import Grid, Section


def sections_of(document: Mapping[str, Any]) -> list[Section]:
    """The sections that a command's document calls for; each kind of result brings its own."""
    sections: list[Section] = []
    if "error" in document:
        sections.append(Section("Failed", document["error"]["what"]))
    if "mean_kld" in document:
        sections.append(accuracy.section_of_divergence(document))
    if "models" in document:
        sections.append(accuracy.section_of_perplexities(document))
    if "results" in document:
        sections.append(accuracy.section_of_tasks(document))
    if "rows" in document:
        sections.append(speed.section_of_bench(document))
    if "checkpoint" in document and is_checkpoint(Path(document["checkpoint"])):
        sections += model.sections_of_checkpoint(Path(document["checkpoint"]))
    return [*sections, _environment(document.get("environment"))]


def _environment(known: Mapping[str, str] | None) -> Section:
    from atomcli.benchmarks.report import environment

    facts = known or environment()
    return Section("Where it ran", grid=Grid(["", ""], [[name.replace("_", " "), str(facts[name])] for name in facts]))
