"""atom compresses large language models to 4-bit weights, activations and KV cache.

Importing this package lets transformers load its checkpoints: `import atomcli` and then
`AutoModelForCausalLM.from_pretrained(DIRECTORY)`.
"""

from atomcli.integrations import registration
from atomcli.version import __version__

__all__ = ["__version__"]

registration.register_when_transformers_loads()
