"""The examples of the manual name only what exists."""

import shlex
from pathlib import Path

import yaml

from atomcli.recipe import load_recipe
from tests.test_documents import check_options

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def test_the_workflow_runs_commands_that_there_are_and_gates_on_the_divergence():
    workflow = yaml.safe_load((EXAMPLES / "quality-gate.yml").read_text())
    (job,) = workflow["jobs"].values()
    lines = [step["run"] for step in job["steps"] if "run" in step]
    commands = [shlex.split(line) for line in lines if line.startswith("atom ")]
    for words in commands:
        check_options(words[: words.index(">")] if ">" in words else words)
        if "--recipe" in words:
            load_recipe(words[words.index("--recipe") + 1])
    assert any("--max-kld" in words for words in commands)
