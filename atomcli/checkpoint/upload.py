"""To the Hugging Face Hub: what can go wrong is found before hours are spent, and one sentence says it."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from atomcli.checkpoint.files import one_line
from atomcli.errors import InputError, RunError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
# What the Hub itself puts into a new repository.
_EMPTY = {".gitattributes"}


def check_destination(repository: str) -> None:
    """Refuse, before anything is made, a repository OWNER/NAME that could not be pushed to.

    Raises UsageError for a name that is none or is taken, InputError without a token or with one that may not write
    there, RunError when the Hub can't be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not _HUB_ID.fullmatch(repository):
        raise UsageError(f"--push is {repository!r}; write OWNER/NAME, a model on the Hugging Face Hub")
    if get_token() is None:
        raise InputError("There is no token to push to the Hub with", _LOGIN)
    hub = HfApi()
    with _sentences(repository):
        me = hub.whoami()
        owner, mine = repository.split("/")[0], {me["name"], *(each["name"] for each in me.get("orgs", []))}
        if owner not in mine:
            raise InputError(
                f"{me['name']} may not push to {repository}",
                f"Push to one of {', '.join(sorted(mine))}, or log in anew.",
            )
        try:
            files = set(hub.list_repo_files(repository))
        except RepositoryNotFoundError:
            return
    if files - _EMPTY:
        raise UsageError(
            f"{repository} is on the Hub already, with {len(files - _EMPTY)} files",
            "Choose another name, or delete it.",
        )


def push(path: Path, repository: str, bars: bool = False) -> str:
    """Upload a directory, or one file, to OWNER/NAME, which is made (private) when it isn't there; returns its page.

    `bars` lets the Hub's client draw its own progress on stderr. Raises InputError and RunError as `check_destination`
    does. What was made stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hub = HfApi()
    with _sentences(repository), ExitStack() as stack:
        if not bars and not are_progress_bars_disabled():
            disable_progress_bars()
            stack.callback(enable_progress_bars)
        page = hub.create_repo(repository, private=True, exist_ok=True)
        message = f"Upload {path.resolve().name}"
        if path.is_dir():
            hub.upload_folder(repo_id=repository, folder_path=path, commit_message=message)
        else:
            hub.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name, commit_message=message)
    return str(page)


@contextmanager
def _sentences(repository: str) -> Iterator[None]:
    """What the client raises, as one sentence."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise RunError(f"{repository} can't be pushed to: HF_HUB_OFFLINE is set", "Unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise InputError(f"The Hub lets this token not write to {repository}", _LOGIN) from error
        raise RunError(f"The Hub refused {repository}: {one_line(error)}", "Try again later.") from error
    except (httpx.HTTPError, OSError) as error:
        raise RunError(
            f"The Hub can't be reached for {repository}: {one_line(error)}", "Check the connection and try again."
        ) from error
