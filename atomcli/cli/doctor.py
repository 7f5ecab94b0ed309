"""`atom doctor`: what this machine can run, and why not."""

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import typer

from atomcli.cli.command import command
from atomcli.cli.console import Table, console
from atomcli.resources import cache_directory
from atomcli.units import byte_count

# What the package is developed and tested with; the same bounds as in pyproject.toml.
_REQUIRED = {"torch": (2, 11), "transformers": (5, 17), "safetensors": (0, 6), "typer": (0, 27)}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `state` is ok, no (not here, and atom runs without it) or broken."""

    what: str
    state: str
    found: str


@command
def doctor() -> None:
    """Say what this machine can run."""
    findings = [*_software(), *_machine(), *_accelerators(), *_kernels()]
    table = Table(["", "what", "found"])
    for finding in findings:
        table.add(finding.state, finding.what, finding.found)
    broken = [finding.what for finding in findings if finding.state == "broken"]
    first = None if broken else _first_command()
    document = {"findings": [asdict(finding) for finding in findings], "usable": not broken, "next": first}
    console.result(document, table)
    if first is not None:
        console.note(f"next: {first}")
    if broken:
        old = " ".join(f"'{name}>={_written(_REQUIRED[name])}'" for name in broken if name in _REQUIRED)
        console.error(
            f"Atom does not run here: {', '.join(broken)}", f"Upgrade with `pip install {old}`" if old else None
        )
        raise typer.Exit(1)


def _first_command() -> str:
    """The one command to type: the demo model in the first of these schemes that a kernel of this machine serves."""
    import torch

    from atomcli.kernels import dispatch

    if not torch.cuda.is_available():
        return "atom quantize demo --samples 8"  # minutes instead of half an hour
    served = {name for name, choice in dispatch.table(torch.device("cuda")).items() if choice.kernel}
    recipes = (("w4a8", "atom-w4a8"), ("nvfp4", "nvfp4"), ("w8a8", "w8a8"))
    recipe = next((recipe for scheme, recipe in recipes if scheme in served), None)
    return "atom quantize demo" + ("" if recipe is None else f" --recipe {recipe}")


def _software() -> list[Finding]:
    findings = [Finding("Python", "ok" if sys.version_info >= (3, 11) else "broken", platform.python_version())]
    for package, least in _REQUIRED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            findings.append(Finding(package, "broken", "not installed"))
            continue
        numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split("+")[0].split(".")[:2])
        fits = numbers >= least
        wanted = "" if fits else f", atom needs at least {_written(least)}"
        findings.append(Finding(package, "ok" if fits else "broken", found + wanted))
    return findings


def _written(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _machine() -> list[Finding]:
    import shutil

    import psutil

    memory = psutil.virtual_memory()
    cache = cache_directory()
    place = next(path for path in (cache, *cache.parents) if path.exists())
    disk = shutil.disk_usage(place)
    writable = os.access(place, os.W_OK)
    return [
        Finding("processor", "ok", f"{platform.machine()}, {_cores()} cores"),
        Finding("memory", "ok", f"{byte_count(memory.available)} free of {byte_count(memory.total)}"),
        Finding("cache", "ok" if writable else "broken", f"{cache}, {byte_count(disk.free)} free"),
    ]


def _cores() -> int:
    """Cores that this process may use; all of them where the system can't tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _accelerators() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        reason = "torch is a build without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return [Finding("GPU", "no", reason)]
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        findings.append(
            Finding(f"GPU {index}", "ok", f"{name}, sm_{major}{minor}, {byte_count(free)} free of {byte_count(total)}")
        )
    return findings


def _kernels() -> list[Finding]:
    """Which kernel serves which scheme here, or why the reference does; one line where the reason is the machine."""
    import torch

    from atomcli.kernels import dispatch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = dispatch.machine_reason(device)
    if reason is not None:
        return [Finding("kernels", "no", reason)]
    return [
        Finding(f"scheme {name}", "ok" if choice.kernel else "no", choice.kernel or f"reference: {choice.reason}")
        for name, choice in dispatch.table(device).items()
    ]
