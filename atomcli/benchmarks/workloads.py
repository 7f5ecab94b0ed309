"""Requests to measure servers on: lengths of prompts and outputs, drawn from a seed, the same for every system.

`paper` is the draw of the Atom paper's serving experiment (Zhao et al., MLSys 2024, section 5), which it has from
Punica (Chen et al., MLSys 2024): prompts of exp(N(ln 18, 0.8)) - 1 tokens, and prompt and output together uniform below
the context; 640 requests, means about 23 and 995. `chat` has the means of ShareGPT's conversations, about 160 and 340.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from atomcli.errors import UsageError

Name = Literal["paper", "chat"]
CONTEXT = 2048
_CHAT = {"prompt": (160, 1.0), "output": (340, 0.8)}  # mean, and spread of the logarithm


@dataclass(frozen=True)
class Request:
    """A prompt of so many tokens, and how many are to be generated."""

    prompt: int
    output: int


def draw(name: Name, requests: int = 640, context: int = CONTEXT, scale: float = 1.0, seed: int = 0) -> list[Request]:
    """The requests of a workload; `scale` shortens every length and the context, for small machines.

    Raises UsageError for an unknown name, no requests, or a scale outside (0, 1].
    """
    if name not in ("paper", "chat"):
        raise UsageError(f"--workload is {name!r}; allowed are paper and chat")
    if requests < 1 or not 0 < scale <= 1 or context * scale < 4:
        raise UsageError(f"{requests} requests at scale {scale} of a context of {context} are no workload")
    generator = np.random.default_rng(seed)
    prompts, totals = (_paper if name == "paper" else _chat)(generator, requests, context)
    longest = math.floor(context * scale)
    drawn = []
    for prompt, total in zip(prompts.tolist(), totals.tolist(), strict=True):
        short = min(max(1, round(prompt * scale)), longest - 1)
        drawn.append(Request(short, max(1, min(round(total * scale), longest) - short)))
    return drawn


def token_ids(request: Request, number: int, vocabulary: int, seed: int = 0) -> list[int]:
    """The prompt of request `number`: random tokens, none shared with another's, so that no prefix is cached."""
    generator = np.random.default_rng((seed, number))
    ids: list[int] = generator.integers(0, vocabulary, request.prompt).tolist()
    return ids


def _paper(generator: np.random.Generator, requests: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    prompts = np.minimum(generator.lognormal(math.log(18), 0.8, requests) - 1, context - 2).astype(int)
    return prompts, np.maximum(prompts + 2, generator.integers(0, context, requests))


def _chat(generator: np.random.Generator, requests: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = {
        kind: generator.lognormal(math.log(mean) - spread**2 / 2, spread, requests)
        for kind, (mean, spread) in _CHAT.items()
    }
    prompts = np.clip(lengths["prompt"].round(), 4, context // 2)
    return prompts, np.minimum(prompts + np.maximum(lengths["output"].round(), 4), context)
