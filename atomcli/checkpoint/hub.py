"""A model on the Hugging Face Hub, brought into the Hub's own cache: safetensors, config and tokenizer only."""

import logging
from pathlib import Path

from atomcli.checkpoint.directory import COMPANIONS, CONFIG, INDEX, PICKLED, SINGLE
from atomcli.checkpoint.files import read_json
from atomcli.errors import InputError

log = logging.getLogger("atomcli")


def fetch(repository: str, cache: Path | None = None) -> Path:
    """The local snapshot of a Hub repository; small files first, then the shards that the index names.

    Pickled weights and Python files are never downloaded. Raises InputError when the repository can't be had or
    holds no safetensors.
    """
    small = [CONFIG, INDEX, *COMPANIONS]
    snapshot = _snapshot(repository, small, None, cache)
    if (snapshot / INDEX).is_file():
        weight_map = read_json(snapshot / INDEX).get("weight_map")
        # An index that has none is refused, and named, when the directory is opened.
        shards = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []
    else:
        shards = [SINGLE]
    if not all((snapshot / shard).is_file() for shard in shards):
        log.info("Downloading %s from the Hub (%d files of weights)", repository, len(shards))
        # The snapshot directory is named after the commit: both steps take the same one.
        snapshot = _snapshot(repository, [*small, *shards], snapshot.name, cache)
    if shards and not any((snapshot / shard).is_file() for shard in shards):
        raise _without_safetensors(repository)
    return snapshot


def _snapshot(repository: str, files: list[str], revision: str | None, cache: Path | None) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=files, revision=revision, cache_dir=cache))
    except GatedRepoError as error:
        raise InputError(
            f"{repository} on the Hub is gated and this account has no access",
            "Accept its terms, then `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"There is neither a directory nor a model on the Hub called {repository!r}",
            "Check the spelling; a private model needs `hf auth login`.",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise InputError(
            f"There is no directory {repository!r} here, and the Hub can't be reached for a model of that name",
            "Check the path or the connection, or try the embedded model: `atom quantize demo`.",
        ) from error


def _without_safetensors(repository: str) -> InputError:
    """Why a repository has no weights for us, from its listing when the Hub answers."""
    import httpx
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repository)
    except (OSError, httpx.HTTPError):
        return InputError(
            f"The weights of {repository} are not in the cache, and the Hub can't be reached",
            "Check the connection, or try the embedded model: `atom quantize demo`.",
        )
    if any(file.endswith(PICKLED) for file in files):
        why = "has only pickled weights, and reading a pickle runs whatever code is in it"
    elif any(file.endswith(".gguf") for file in files):
        why = "has only GGUF files"
    else:
        why = "holds no safetensors weights"
    return InputError(
        f"{repository} on the Hub {why}", "Choose a model in safetensors, or download a GGUF file and pass its path."
    )
