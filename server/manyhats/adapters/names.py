"""The files that an adapter consists of, by name; imports nothing, so that the command line may."""

from __future__ import annotations

from typing import Final

CONFIG_NAME: Final = "adapter_config.json"
"""The one name under which a configuration is looked for."""

WEIGHTS_NAME: Final = "adapter_model.safetensors"
"""The name under which weights are looked for first, and kept."""

ADAPTERHUB_WEIGHTS_NAME: Final = "adapter.safetensors"
"""The name under which AdapterHub's library saves them, looked for where there are no others."""

HEAD_NAMES: Final = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
"""What AdapterHub's library saves of a prediction head, beside an adapter."""
