"""The families atom knows, by architecture."""

from transformers import PreTrainedConfig

from atomcli.errors import InputError, UnsupportedError
from atomcli.models import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from atomcli.models.block import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
)


def describe(config: PreTrainedConfig) -> Family:
    """The family of a model by config.architectures, or by config.model_type where that is missing.

    Raises UnsupportedError for an architecture without a description, InputError for one of another model_type.
    """
    architectures = tuple(config.architectures or ())
    for family in FAMILIES:
        if set(architectures) & set(family.architectures) or (not architectures and config.model_type == family.name):
            if config.model_type != family.name:
                raise InputError(
                    f"config.json names the architecture {' or '.join(architectures)} and the model_type "
                    f"{config.model_type}, but that architecture's is {family.name}",
                    "Copy config.json again.",
                )
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedError(
        f"atom has no description of {' or '.join(architectures) or config.model_type}; it knows {known}",
        "A description (atomcli/models/*.py, ten lines) names transformers' decoder layer, which of its linears have "
        "biases, whether queries and keys are normalized, its sliding window, and how its experts lie on disk.",
    )
