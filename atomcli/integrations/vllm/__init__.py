"""vLLM: serves atom checkpoints, with tensor parallelism and whatever else vLLM does.

vLLM calls `register` in every process through the entry point `vllm.general_plugins`. The numbers are those of
`runtime` and `kernels`; here they only meet vLLM's layers, loader and scheduler.
"""


def register() -> None:
    """Teach vLLM the quantization method `atom`; may be called any number of times, in any process."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if "atom" not in QUANTIZATION_METHODS:
        from atomcli.integrations.vllm.config import AtomConfig

        register_quantization_config("atom")(AtomConfig)
