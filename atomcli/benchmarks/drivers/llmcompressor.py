"""llm-compressor: GPTQ, SpinQuant and QuIP into compressed-tensors, the formats that vLLM reads."""

import json
import re
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.transform import TransformConfig, apply_transform_config
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from safetensors import safe_open

from atomcli.benchmarks.drivers.run import compressed_tensors_model, parent_model, run, tokenizer
from atomcli.benchmarks.scores import Job

# Sizes that are no power of two have Hadamard matrices only in the random family (576 = 16 × 36).
ROTATION = "random-hadamard"
_ROTATION_WEIGHT = re.compile(r"\.\w+_(input|output)\.weight$")


def quantize(job: Job, out: Path) -> dict[str, Any]:
    """`oneshot` with the recipe of the job's method, for example spinquant-gptq-w4a4."""
    *steps, name = job.method.split("-")
    scheme = preset_name_to_scheme(name.upper(), ["Linear"])
    if scheme.weights.group_size == 128:  # the integer presets' own; NVFP4 has groups of 16 by definition
        scheme.weights.group_size = job.group
    modifiers: list[Any] = []
    if "spinquant" in steps:
        # R4, at run time before down_proj, is for quantized activations; R3 is for a quantized cache.
        rotations = ["R1", "R2"] + ["R4"] * (scheme.input_activations is not None)
        modifiers.append(SpinQuantModifier(rotations=rotations, transform_type=ROTATION))
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
    """The checkpoint through transformers, and the rotations that it leaves out."""
    model = compressed_tensors_model(job.checkpoint)
    _rotate_at_run_time(model, job.checkpoint)
    return model


def _rotate_at_run_time(model: Any, checkpoint: Path) -> None:
    """Attach the rotations of inputs, which transformers leaves out, with the matrices that the checkpoint holds."""
    saved = json.loads((checkpoint / "config.json").read_text())["quantization_config"].get("transform_config")
    config = TransformConfig.model_validate(saved or {"config_groups": {}})
    for scheme in config.config_groups.values():
        scheme.apply = [each for each in scheme.apply if each.location in ("input", "output")]
    groups = {name: scheme for name, scheme in config.config_groups.items() if scheme.apply}
    if not groups:
        return
    apply_transform_config(model, TransformConfig(config_groups=groups))
    # Linears of one size share a matrix, which is saved under the name of the first of them.
    matrices = {name: parameter for name, parameter in model.named_parameters() if _ROTATION_WEIGHT.search(name)}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in matrices.keys() & {*file.keys()}:
                matrices.pop(name).data.copy_(file.get_tensor(name))
    if matrices:
        raise ValueError(f"the checkpoint lacks the rotation {next(iter(matrices))}")


def _activations(scheme: QuantizationScheme) -> dict[str, Any] | None:
    given = scheme.input_activations
    if given is None:
        return None
    return {"bits": given.num_bits, "group": given.group_size, "scale_bits": 8 if given.type == "float" else 16}


if __name__ == "__main__":
    run(quantize, load, "llmcompressor")
