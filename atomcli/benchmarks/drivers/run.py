"""What all drivers share: read the job, have the peer make its checkpoint, load it again, score it by our code."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atomcli.benchmarks.scores import Job, make, score, versions
from atomcli.evaluation.scoring import Progress


def run(quantize: Callable[[Job, Path], dict[str, Any]], load: Callable[[Job], Any], package: str) -> None:
    """Work off the job that the command line names.

    `quantize` fills a directory and returns what the table must know of it (`activations`: bits, group, scale_bits);
    `load` opens the job's checkpoint as the peer does, with its simulated activation quantization.
    """
    job = Job.read(Path(sys.argv[1]))
    logging.basicConfig(level=logging.WARNING)
    torch.manual_seed(job.seed)

    def made(checkpoint: Path) -> dict[str, Any]:
        unfinished = checkpoint.with_name(checkpoint.name + ".unfinished")
        for leftover in (unfinished, checkpoint):
            shutil.rmtree(leftover, ignore_errors=True)
        facts = quantize(job, unfinished)
        unfinished.rename(checkpoint)
        return {**facts, "versions": versions([package, "torch", "transformers"])}

    def opened() -> tuple[Any, Any]:
        return load(job).to(job.device).eval(), tokenizer(job)

    make(job, made)
    score(job, opened, _counter)


def parent_model(job: Job) -> Any:
    """The parent, as transformers loads it, in the dtype that it is stored in."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.parent, dtype="auto").eval()


def compressed_tensors_model(checkpoint: Path) -> Any:
    """A compressed-tensors checkpoint through transformers, whose integration simulates the activation quantization.

    Weights are unpacked at once: left to itself it does so in the causal model's forward, which `base_model` goes past.
    Unpacking binds every module to the device that it was loaded on: after a move its forward would still bring the
    weights and the inputs back there, and compute there. So the binding is removed, and the model follows `to`.
    """
    from compressed_tensors.offload import remove_dispatch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", quantization_config=config)
    return remove_dispatch(model)


def dense(model: Any, packed: str) -> Any:
    """The model with its packed linears, those with a tensor of the name `packed`, unpacked by their own forwards.

    These unpack at each call and multiply 16-bit numbers, minutes a window on a CPU without 16-bit instructions. Of the
    identity's rows they give the weights exactly: each sum has one term that isn't 0.
    """
    for name, module in [*model.named_modules()]:
        if not hasattr(module, packed):
            continue
        if getattr(module, "bias", None) is not None:
            raise ValueError(f"{name} has a bias, which would be taken for a part of its weight")
        inputs = module.in_features if hasattr(module, "in_features") else module.infeatures
        with torch.inference_mode():
            weight = module(torch.eye(inputs, device=getattr(module, packed).device)).T.to(model.dtype)
        linear = torch.nn.Linear(inputs, len(weight), bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
        model.set_submodule(name, linear)
    return model


def tokenizer(job: Job) -> Any:
    """The parent's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job.parent)


def _counter(stage: str, unit: str) -> Progress:
    def say(done: int, total: int) -> None:
        sys.stderr.write(f"{stage}: {unit} {done}/{total}\n")

    return say
