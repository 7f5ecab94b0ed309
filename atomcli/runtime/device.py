"""The device that a person names, or the one that a machine offers."""

import torch

from atomcli.errors import UsageError


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device to work on, a GPU where there is one and none was named; UsageError for one that isn't here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is {str(device)!r}; allowed are cpu, cuda and cuda:N")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise UsageError(
            f"--device is {str(device)!r}, but there {'is' if count == 1 else 'are'} {count or 'no'} "
            f"CUDA device{'s' * (count != 1)} here",
            "`atom doctor` says what this machine has",
        )
    return chosen
