"""SHA-256 of files, remembered in the user's cache so that a 140 GB model is hashed once.

A remembered digest is used only while the file's real path, size, inode, mtime and ctime are the ones it was
computed for; changing the content without changing any of these takes deliberate effort.
"""

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atomcli.checkpoint.files import unreadable
from atomcli.resources import cache_directory

_CHUNK = 1 << 22
# hashlib lets go of the interpreter lock, so threads scale until the disk is the limit.
HASHING = min(4, os.cpu_count() or 1)


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, always computed; InputError when it can't be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def file_digests(paths: list[Path]) -> list[str]:
    """SHA-256 (hex) of each file, from the cache where the file hasn't been touched since it was computed."""
    keys = [_identity(path) for path in paths]
    known = {key: digest for key in keys if (digest := _recall(key))}
    missing = [(key, path) for key, path in zip(keys, paths, strict=True) if key not in known]
    with ThreadPoolExecutor(HASHING) as pool:
        for (key, _), digest in zip(missing, pool.map(sha256_file, [path for _, path in missing]), strict=True):
            _remember(key, digest)
            known[key] = digest
    return [known[key] for key in keys]


def combined_digest(files: dict[str, Path]) -> str:
    """One SHA-256 (hex) over names, sizes and contents; independent of where the files lie."""
    names = sorted(files)
    digests = file_digests([files[name] for name in names])
    rows = [[name, files[name].stat().st_size, digest] for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _identity(path: Path) -> str:
    try:
        real = path.resolve(strict=True)
        stat = real.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    fields = (str(real), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(repr(fields).encode()).hexdigest()


def _recall(key: str) -> str | None:
    try:
        digest = (cache_directory() / "digests" / key).read_text()
    except OSError:
        return None
    return digest if len(digest) == 64 else None


def _remember(key: str, digest: str) -> None:
    """Best effort: a cache that can't be written (read-only home) costs time, not correctness."""
    directory = cache_directory() / "digests"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory)
        with os.fdopen(handle, "w") as file:
            file.write(digest)
        Path(temporary).replace(directory / key)
    except OSError:
        return
