"""GPTQModel: GPTQ into the GPTQ format."""

import os
from pathlib import Path
from typing import Any

# It asks for as many workers as a large machine has and stops where the CPU has fewer.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count()))

from gptqmodel import GPTQModel, QuantizeConfig

from atomcli.benchmarks.drivers.run import run
from atomcli.benchmarks.scores import Job


def quantize(job: Job, out: Path) -> dict[str, Any]:
    """Its default GPTQ at 4 bits in the job's groups."""
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.calibration().tolist()]
    model = GPTQModel.load(str(job.parent), QuantizeConfig(bits=4, group_size=job.group), device=job.device)
    model.quantize(rows, batch_size=1)
    model.save(str(out))
    return {"activations": None}


def load(job: Job) -> Any:
    """The checkpoint through its own loader."""
    return GPTQModel.load(str(job.checkpoint), device=job.device).model


if __name__ == "__main__":
    run(quantize, load, "gptqmodel")
