"""Memory in which the blocks of one launch leave each other sums and flags."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from atomcli.kernels.compiler import cuda_driver


class Workspace(NamedTuple):
    """`partials`, words of 32 bits, is scratch; `flags` int32 is zero between launches: every kernel leaves it so."""

    capture: int
    partials: Tensor
    flags: Tensor


_workspaces: dict[tuple[int | None, int, str], Workspace] = {}


def workspace(device: torch.device, name: str, partials: int, flags: int) -> Workspace:
    """The workspace of this name on the current stream, whose kernels run one after another and may share it.

    Each capture of a CUDA graph gets its own: a graph's memory must not depend on another's replay.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    key, capture = (device.index, stream, name), _capture_id(stream)
    found = _workspaces.get(key)
    if found is None or found.capture != capture or found.partials.numel() < partials or found.flags.numel() < flags:
        found = Workspace(
            capture,
            torch.empty(partials, dtype=torch.float32, device=device),
            torch.zeros(flags, dtype=torch.int32, device=device),
        )
        _workspaces[key] = found
    return found


def _capture_id(stream: int) -> int:
    """Identity of the graph capture that the stream takes part in; 0 outside."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, identity = ctypes.c_int(), ctypes.c_uint64()
    cuda_driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(identity), None, None, None
    )
    return identity.value
