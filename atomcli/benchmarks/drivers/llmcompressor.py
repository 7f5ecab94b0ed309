"""llm-compressor: GPTQ, SpinQuant and QuIP into compressed-tensors, the formats that vLLM reads."""

from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from atomcli.benchmarks.drivers.run import parent_model, run, tokenizer
from atomcli.benchmarks.scores import Job

# Sizes that are no power of two have Hadamard matrices only in the random family (576 = 16 × 36).
ROTATION = "random-hadamard"


def quantize(job: Job, out: Path) -> dict[str, Any]:
    """`oneshot` with the recipe of the job's method, for example spinquant-gptq-w4a4."""
    *steps, name = job.method.split("-")
    scheme = preset_name_to_scheme(name.upper(), ["Linear"])
    if scheme.weights.group_size == 128:  # the integer presets' own; NVFP4 has groups of 16 by definition
        scheme.weights.group_size = job.group
    modifiers: list[Any] = []
    if "spinquant" in steps:
        modifiers.append(SpinQuantModifier(rotations=["R1", "R2"], transform_type=ROTATION))
    if "quip" in steps:
        modifiers.append(QuIPModifier(rotations=["v"], transform_type=ROTATION))
    rounding = GPTQModifier if "gptq" in steps else QuantizationModifier
    modifiers.append(rounding(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    tokens = job.calibration()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    model = parent_model(job)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifiers,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer(job).save_pretrained(out)
    return {"activations": _activations(scheme)}


def load(job: Job) -> Any:
    """The checkpoint through transformers, whose compressed-tensors integration quantizes the activations.

    Weights are unpacked at once: left to itself it does so in the causal model's forward, which `base_model` goes past.
    """
    config = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype="auto", quantization_config=config)


def _activations(scheme: QuantizationScheme) -> dict[str, Any] | None:
    given = scheme.input_activations
    if given is None:
        return None
    return {"bits": given.num_bits, "group": given.group_size, "scale_bits": 8 if given.type == "float" else 16}


if __name__ == "__main__":
    run(quantize, load, "llmcompressor")
