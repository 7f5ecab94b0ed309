"""Runs vLLM engines in a process of their own: `python vllm_runs.py JOBS.json`, one line of JSON per job on stdout."""

import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

# A CPU engine in one process, in what little memory a test should take.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_CI_ENV": "1",  # torch.compile traces and runs what it traced
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**26,
    "gpu_memory_utilization": 0.05,
}
MARK = "vllm_runs: "


def run(jobs: list[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """The jobs' results: {"tokens": [...], "logprobs": [...]} of each prompt, or {"error": what an engine said}.

    A job: {"model": directory, "prompts": lists of ids, "tokens": how many to generate, "options": vLLM's}.
    """
    # Engines of one rank can follow each other in a process; those of several can't.
    several = [job for job in jobs if "tensor_parallel_size" in job.get("options", {})]
    if len(jobs) > 1 and several:
        return [run([job], directory)[0] for job in jobs]
    file = directory / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, __file__, str(file)], capture_output=True, text=True, env=environment, timeout=1800
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert len(lines) == len(jobs), done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line.removeprefix(MARK)) for line in lines]


def _generate(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(job["model"], **(OPTIONS | job.get("options", {})))
    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, logprobs=1, detokenize=False)
    outputs = [
        output.outputs[0] for output in engine.generate([{"prompt_token_ids": p} for p in job["prompts"]], sampling)
    ]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ],
    }


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            result = _generate(job)
        except Exception as error:  # an engine refuses in many ways; the test looks at what it said
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-4000:]}
        print(MARK + json.dumps(result), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
