"""transformers: `AutoModelForCausalLM.from_pretrained` of an atom checkpoint.

Written to what transformers 5.17 and 5.23 have in common. The modules, and the numbers they compute, are those of
`runtime`; here they only meet transformers' loader.
"""

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "atom"


@register_quantization_config(METHOD)
class AtomConfig(QuantizationConfigMixin):
    """quantization_config of an atom checkpoint, kept as the plain data that config.json holds."""

    def __init__(self, **data: Any) -> None:
        self.quant_method: Any = METHOD
        for key, value in data.items():
            setattr(self, key, value)


@register_quantizer(METHOD)
class AtomQuantizer(HfQuantizer):
    """Gives the empty model atom's modules before transformers fills in the tensors."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Imported here: this module is loaded while transformers is still importing itself.
        from atomcli.runtime import decoder, saved

        plan = saved.Plan.from_dict(self.quantization_config.to_dict())
        dtype = kwargs.get("dtype")
        decoder.quantize_skeleton(model, plan, dtype if isinstance(dtype, torch.dtype) else model.dtype)
        # transformers only warns of missing tensors and fills them with random numbers; here they are errors.
        if kwargs.get("checkpoint_files"):
            saved.check_tensors(model, kwargs["checkpoint_files"])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from atomcli.runtime import decoder

        return decoder.finish_quantized(model)

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> list[Any]:
        """None: tensors are stored under the names they have in memory, experts too."""
        return []

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the checkpoint's tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Quantized weights have no gradients."""
        return False
