"""A whole model's speed: prefill, time to first token, decode, and the bytes of weights and KV cache.

Timed is what a server does for a batch of equal prompts: the prompt in one forward pass up to the first token on the
host, then one token at a time from the model's own cache, greedy, each token brought to the host. Models are loaded one
after the other, so a parent and its checkpoint never share memory. Which path ran is asked of the layers and said in
the note: a speed of the reference path says nothing about the kernels.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from atomcli.benchmarks.report import Row, exact, measure
from atomcli.errors import UsageError
from atomcli.runtime.cache import QuantizedKVLayer, cache_bytes
from atomcli.runtime.linear import QuantLinear, pick_kernel, reference_kernel

SEED = 0


@dataclass(frozen=True)
class Run:
    """One generation: seconds of the prompt's forward pass, to the first token, and of all later steps; KV bytes."""

    prefill: float
    first_token: float
    decode: float
    kv_bytes: int
    quantized_cache: bool


def bench_model(
    models: Mapping[str, Callable[[], Any]],
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int = 32,
    repeats: int = 3,
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """A row per model, batch and context, rows of one setting side by side; medians and quartiles over `repeats`.

    `models` maps a name to its loader. Raises UsageError for a setting below 1 or a context that a model can't take;
    a setting that runs out of memory keeps its row, with no numbers and the reason in the note.
    """
    for option, values in (
        ("--batch", batches),
        ("--context", contexts),
        ("--new-tokens", [new_tokens]),
        ("--repeats", [repeats]),
    ):
        if not values or min(values) < 1:
            raise UsageError(f"{option} {', '.join(map(str, values))}: every value must be at least 1")
    grid = list(product(batches, contexts))
    total = len(models) * len(grid) * (warmup + repeats)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rows: dict[tuple[int, int], list[Row]] = {setting: [] for setting in grid}
    for name, load in models.items():
        model = load()
        _check_contexts(name, model, contexts, new_tokens)
        for batch, context in grid:
            row = _bench_setting(name, model, batch, context, new_tokens, repeats, warmup, step)
            rows[batch, context].append(row)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [row for setting in grid for row in rows[setting]]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as they lie in memory; storage that two of them share counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    return sum(tensor.nbytes for tensor in tensors.values())


def path_note(model: nn.Module, tokens: int) -> str:
    """Which implementation the quantized linears take for `tokens` rows of input; says so when none is quantized."""
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not linears:
        return "16-bit linears of torch" if _element_size(model) == 2 else "fp32 linears of torch"
    without_kernel = 0
    for linear in linears:
        x = torch.empty(tokens, linear.in_features, dtype=_dtype(model), device=_device(model))
        without_kernel += pick_kernel(linear, x) is reference_kernel
    if without_kernel == len(linears):
        return "reference path: no kernel runs, each product dequantizes in torch"
    if without_kernel:
        return f"kernels in {len(linears) - without_kernel} of {len(linears)} linears, the reference path in the others"
    return f"kernels in all {len(linears)} quantized linears"


@torch.inference_mode()
def generate_once(model: Any, prompts: Tensor, new_tokens: int) -> Run:
    """Times one greedy generation; prompts (batch, context) on the model's device, `new_tokens` after the first."""
    _synchronize(prompts.device)
    start = time.perf_counter()
    output = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    _synchronize(prompts.device)
    prefilled = time.perf_counter()
    token = output.logits[:, -1:].argmax(-1)
    token.tolist()
    first = time.perf_counter()
    cache = output.past_key_values
    kv_bytes = cache_bytes(cache)
    quantized = any(isinstance(layer, QuantizedKVLayer) for layer in cache.layers)
    begin = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        token.tolist()  # a server must see each token before it can stop or stream it
    return Run(prefilled - start, first - start, time.perf_counter() - begin, kv_bytes, quantized)


def _bench_setting(
    name: str,
    model: Any,
    batch: int,
    context: int,
    new_tokens: int,
    repeats: int,
    warmup: int,
    step: Callable[[], None],
) -> Row:
    labels: dict[str, str | int | float] = {"model": name, "batch": batch, "context": context}
    extra: dict[str, str | int | float] = {
        "new_tokens": new_tokens,
        "warmup": warmup,
        "dtype": str(_dtype(model)),
        "device": str(_device(model)),
    }
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(_device(model))
    runs = []
    try:
        for index in range(warmup + repeats):
            run = generate_once(model, prompts, new_tokens)
            if index >= warmup:
                runs.append(run)
            step()
    except torch.OutOfMemoryError:
        columns = ("prefill", "first token", "decode", "KV cache")
        empty = dict.fromkeys(columns) | {"weights": exact(weight_bytes(model), "bytes")}
        return Row(labels, empty, "out of memory", extra)
    measures = {
        "prefill": measure([batch * context / run.prefill for run in runs], "tokens/s"),
        "first token": measure([run.first_token * 1e3 for run in runs], "ms"),
        "decode": measure([batch * new_tokens / run.decode for run in runs], "tokens/s"),
        "KV cache": exact(runs[0].kv_bytes, "bytes"),
        "weights": exact(weight_bytes(model), "bytes"),
    }
    return Row(labels, measures, _note(model, batch, context, runs[0]), extra)


def _note(model: Any, batch: int, context: int, run: Run) -> str:
    """What ran in prefill and in decode, once when it is the same, and how the cache is read."""
    prefill, decode = path_note(model, batch * context), path_note(model, batch)
    note = decode if prefill == decode else f"prefill: {prefill}; decode: {decode}"
    return f"{note}; attention dequantizes the cache" if run.quantized_cache else note


def _check_contexts(name: str, model: Any, contexts: Sequence[int], new_tokens: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and max(contexts) + new_tokens > longest:
        raise UsageError(
            f"--context {max(contexts)} and {new_tokens} new tokens exceed the {longest} positions of {name}",
            f"use a context of at most {longest - new_tokens}",
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _dtype(model: Any) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


def _element_size(model: Any) -> int:
    return _dtype(model).itemsize
