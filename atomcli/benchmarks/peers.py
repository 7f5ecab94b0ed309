"""The peers of the accuracy bench: which methods they offer, and how one of them is run in its own environment."""

import difflib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atomcli.benchmarks.scores import Job
from atomcli.errors import RunError, UsageError

# A peer's name -> what `pip install` gets in an environment of its own; lm-eval is for the zero-shot tasks.
INSTALL = {
    "llmcompressor": "llmcompressor==0.14.0.1 lm-eval",
    "auto-round": "auto-round==0.15.1 compressed-tensors lm-eval",
    "gptqmodel": "--no-build-isolation gptqmodel==7.6.0 lm-eval",
}
_PACKAGE = Path(__file__).resolve().parents[1]
_DRIVERS = {"llmcompressor": "llmcompressor", "auto-round": "auto_round", "gptqmodel": "gptqmodel"}


@dataclass(frozen=True)
class Peer:
    """One method of a peer: the peer's name, the method as its driver calls it, and the class that it competes in."""

    library: str
    method: str
    kind: str

    @property
    def name(self) -> str:
        """What the command line and the table call it."""
        return f"{self.library}/{self.method}"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("llmcompressor", "gptq-w4a16", "W4A16"),
        Peer("llmcompressor", "spinquant-gptq-w4a16", "W4A16"),
        Peer("llmcompressor", "quip-gptq-w4a16", "W4A16"),
        Peer("auto-round", "w4a16", "W4A16"),
        Peer("auto-round", "light-w4a16", "W4A16"),
        Peer("auto-round", "opt-rtn-w4a16", "W4A16"),
        Peer("auto-round", "rtn-w4a16", "W4A16"),
        Peer("gptqmodel", "gptq-w4a16", "W4A16"),
        Peer("llmcompressor", "gptq-w4a8", "W4A8"),
        Peer("llmcompressor", "spinquant-gptq-w4a8", "W4A8"),
        Peer("llmcompressor", "quip-gptq-w4a8", "W4A8"),
        Peer("llmcompressor", "gptq-w4a4", "W4A4 INT"),
        Peer("llmcompressor", "spinquant-gptq-w4a4", "W4A4 INT"),
        Peer("llmcompressor", "quip-gptq-w4a4", "W4A4 INT"),
        Peer("llmcompressor", "nvfp4", "W4A4 FP"),
        Peer("llmcompressor", "gptq-nvfp4", "W4A4 FP"),
        Peer("auto-round", "nvfp4", "W4A4 FP"),
        Peer("auto-round", "rtn-nvfp4", "W4A4 FP"),
    )
}


def choose_peers(names: list[str] | None) -> list[Peer]:
    """The methods of these names; all for None, none for `none`. UsageError names the nearest of an unknown one."""
    if names is None or names == ["none"]:
        return [] if names else list(PEERS.values())
    for name in names:
        if name not in PEERS:
            nearest = difflib.get_close_matches(name, PEERS, n=1)
            hint = f"Did you mean {nearest[0]}?" if nearest else f"There are {', '.join(PEERS)}, and none"
            raise UsageError(f"--peer is {name!r}, which is no peer's method", hint)
    return [PEERS[name] for name in names]


def parse_pythons(given: list[str]) -> dict[str, Path]:
    """Interpreters by peer from NAME=PATH (an environment's directory, or its python); UsageError for anything else."""
    pythons = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in INSTALL or not path:
            raise UsageError(f"--peer-python is {text!r}; write NAME=PATH with NAME one of {', '.join(INSTALL)}")
        python = Path(path).expanduser()
        python = python / "bin" / "python" if python.is_dir() else python
        if not python.is_file():
            raise UsageError(f"--peer-python {name}: there is no Python at {python}")
        # A link is not followed: an environment is known by the name that its interpreter is called by.
        pythons[name] = Path(os.path.abspath(python))  # noqa: PTH100
    return pythons


def run_peer(peer: Peer, python: Path, job: Job, directory: Path) -> None:
    """Run a peer's driver on a job in `directory`; RunError with its last words when it fails."""
    request, log = directory / "job.json", directory / "log.txt"
    job.write(request)
    driver = f"atomcli.benchmarks.drivers.{_DRIVERS[peer.library]}"
    # -P: what lies in the current directory is nobody's module.
    with log.open("wb") as out:
        done = subprocess.run(
            [str(python), "-P", "-m", driver, str(request)],
            env={**os.environ, **_import_path(directory)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RunError(f"Exit code {done.returncode}, {_last_words(log)}", f"All that it said is in {log}")


def _import_path(directory: Path) -> Mapping[str, str]:
    """A path on which a peer finds atom and nothing else that is installed beside it."""
    path = directory / "import"
    path.mkdir(exist_ok=True)
    link = path / "atomcli"
    link.unlink(missing_ok=True)
    link.symlink_to(_PACKAGE, target_is_directory=True)
    return {"PYTHONPATH": str(path), "TOKENIZERS_PARALLELISM": "false"}


def _last_words(log: Path) -> str:
    """The error that a traceback ends with, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [""])[-1][:200]
