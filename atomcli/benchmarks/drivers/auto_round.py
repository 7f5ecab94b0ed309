"""auto-round: rounding and clip learned by signed gradient descent, block by block."""

from pathlib import Path
from typing import Any

from auto_round import AutoRound
from transformers import AutoModelForCausalLM

from atomcli.benchmarks.drivers.run import compressed_tensors_model, dense, parent_model, run, tokenizer
from atomcli.benchmarks.scores import Job

ITERATIONS = {"": 200, "light": 50, "rtn": 0, "opt-rtn": 0}  # its default, its light recipe, and no tuning
# What its own recipes of these names set beside the iterations. Left alone it learns at 1 / iterations, and without
# iterations it searches scales (opt-rtn).
OPTIONS: dict[str, dict[str, Any]] = {
    "light": {"lr": 5e-3},
    "rtn": {"disable_opt_rtn": True},
    "opt-rtn": {"disable_opt_rtn": False},
}
FORMATS = {"w4a16": "auto_round", "nvfp4": "llm_compressor"}
ACTIVATIONS = {"w4a16": None, "nvfp4": {"bits": 4, "group": 16, "scale_bits": 8}}


def quantize(job: Job, out: Path) -> dict[str, Any]:
    """`AutoRound` with the preset and the number of iterations of the job's method, for example light-w4a16."""
    effort, _, name = job.method.rpartition("-")
    tokens = job.calibration()
    options: dict[str, Any] = {"group_size": job.group} if name == "w4a16" else {}
    options |= OPTIONS.get(effort, {})
    rounder = AutoRound(
        parent_model(job),
        tokenizer(job),
        scheme=name.upper(),
        iters=ITERATIONS[effort],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=min(8, len(tokens)),
        dataset=[row[None] for row in tokens],
        seed=job.seed,
        device_map=job.device,
        enable_torch_compile=False,  # on a CPU compiling takes longer than it saves
        **options,
    )
    rounder.quantize_and_save(str(out), format=FORMATS[name])
    (config,) = out.rglob("config.json")  # it may put a directory of the model's name in between
    for path in [*config.parent.iterdir()] if config.parent != out else []:
        path.rename(out / path.name)
    return {"activations": ACTIVATIONS[name], "iterations": ITERATIONS[effort]}


def load(job: Job) -> Any:
    """The checkpoint through transformers, with auto-round's own linears or compressed-tensors'."""
    if FORMATS[job.method.rpartition("-")[2]] == "llm_compressor":
        return compressed_tensors_model(job.checkpoint)
    import auto_round.inference  # noqa: F401  registers its format

    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype="auto", device_map=job.device)
    return dense(model, "qweight") if job.device == "cpu" else model


if __name__ == "__main__":
    run(quantize, load, "auto-round")
