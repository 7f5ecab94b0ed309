"""What one model scores on the job of the accuracy bench: the part that runs in a peer's own environment too.

A job travels as a JSON file beside two tensor files, so that every tool calibrates on the same tokens and is measured
on the same windows against the same parent, by this code. It needs torch, safetensors and atom's evaluation, and no
other room: a peer's environment has other versions of everything else.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from atomcli.evaluation.divergence import Recording, divergence
from atomcli.evaluation.perplexity import TokenPerplexity, from_window_means
from atomcli.evaluation.scoring import Progress, negative_log_likelihoods
from atomcli.evaluation.tasks import run_tasks


@dataclass(frozen=True)
class Job:
    """One method on one model: where everything lies, and what the method must know.

    parent: the model in Hugging Face form. tokens: `calibration` int64 (samples, length). recording: the parent on the
    windows. checkpoint: the directory that the method makes. made, text, tasks_result: JSON files that appear when a
    part is done; a part whose file is there is not done again.
    """

    method: str
    parent: Path
    tokens: Path
    recording: Path
    checkpoint: Path
    made: Path
    text: Path
    tasks_result: Path
    group: int = 128
    seed: int = 0
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    device: str = "cpu"

    def write(self, path: Path) -> None:
        """Save the job for a driver."""
        fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        write(path, fields)

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job that `write` saved."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        paths = ("parent", "tokens", "recording", "checkpoint", "made", "text", "tasks_result")
        return cls(**fields | {key: Path(fields[key]) for key in paths} | {"tasks": tuple(fields["tasks"])})

    def calibration(self) -> Tensor:
        """The tokens to calibrate on, int64 (samples, length)."""
        with safe_open(self.tokens, "pt") as file:
            return file.get_tensor("calibration")


def save_recording(recording: Recording, path: Path) -> None:
    """Keep a parent's predictions for other processes: windows, last hidden states and the head's weight."""
    head: Any = recording.head
    hidden = torch.stack([*recording.hidden])
    _save(path, {"windows": recording.windows, "hidden": hidden, "head": head.weight.detach()})


def load_recording(path: Path, device: str = "cpu") -> Recording:
    """The recording that `save_recording` kept, its head on `device`."""
    with safe_open(path, "pt") as file:
        windows, hidden, weight = (file.get_tensor(name) for name in ("windows", "hidden", "head"))
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight.to(device), requires_grad=False)
    return Recording(head, list(hidden), windows)


def save_tokens(tokens: Tensor, path: Path) -> None:
    """Keep the calibration tokens (samples, length) for the drivers."""
    _save(path, {"calibration": tokens})


def parent_perplexity(recording: Recording) -> TokenPerplexity:
    """Token perplexity of the recorded parent; only its head runs again."""
    means = [
        float(negative_log_likelihoods(recording.head, hidden[:-1], window[1:]).mean())
        for hidden, window in zip(recording.hidden, recording.windows, strict=True)
    ]
    return from_window_means(means, recording.windows.shape[1], "parent")


def make(job: Job, quantize: Callable[[Path], dict[str, Any]]) -> None:
    """Have `quantize` fill the job's checkpoint directory unless it is there; what it returns is kept in `made`."""
    if job.made.is_file():
        return
    started = time.perf_counter()
    facts = quantize(job.checkpoint)
    write(job.made, {"seconds": time.perf_counter() - started, **facts})


def score(job: Job, load: Callable[[], tuple[Any, Any]], counter: Callable[[str, str], Progress | None]) -> None:
    """Measure what isn't measured yet; `load` gives (model, tokenizer), `counter` a progress for (stage, unit)."""
    on_text, on_tasks = not job.text.is_file(), bool(job.tasks) and not job.tasks_result.is_file()
    if not on_text and not on_tasks:
        return
    model, tokenizer = load()
    if on_text:
        recording = load_recording(job.recording, job.device)
        result = divergence(recording, model, recording.windows, progress=counter("text", "window"))
        windows = {"window_kld": result.window_kld, "window_nll": result.window_nll}
        error = {"token_perplexity_standard_error": result.checkpoint.standard_error}
        write(job.text, result.row() | error | windows)
        del recording
    if on_tasks:
        results = run_tasks(model, tokenizer, job.tasks, job.limit, progress=counter("tasks", "answer"))
        write(job.tasks_result, {"results": [each.row() for each in results]})
    del model
    gc.collect()


def write(path: Path, value: dict[str, Any]) -> None:
    """A JSON file that appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of installed packages."""
    from importlib.metadata import version

    return {package: version(package) for package in packages}


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)
