"""Shell completion: typer's scripts, and what they are answered."""

import os
import subprocess
import sys

import pytest


def completed(words: str) -> list[str]:
    """What bash is answered for a command line whose last word is being typed."""
    position = str(len(words.split(" ")) - 1)
    environment = os.environ | {"COMP_WORDS": words, "COMP_CWORD": position, "_ATOM_COMPLETE": "complete_bash"}
    script = "from atomcli.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("atom qu", ["quantize"]),
        ("atom recipes s", ["show"]),
        ("atom export x --to c", ["compressed-tensors"]),
        ("atom quantize demo --recipe w4a16", ["w4a16", "w4a16-plain"]),
    ],
)
def test_commands_options_and_recipes_are_completed(words, answer):
    assert completed(words) == answer


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_the_shell(shell):
    # The variable lets the shell be named instead of being looked for among the parent processes.
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    words = [sys.executable, "-m", "atomcli", "--show-completion", shell]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_ATOM_COMPLETE" in done.stdout
