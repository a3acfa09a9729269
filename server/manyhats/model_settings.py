"""The settings of the base model and what computes it; the rest is in ``config.py``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from manyhats.choices import Device, Dtype, Kernels, Quantization


class ModelSettings(BaseSettings):
    """A part of ``config.Settings``, which alone is made."""

    model_config = SettingsConfigDict(
        env_prefix="MANYHATS_", frozen=True, extra="forbid", validate_default=True
    )

    home: Path = Field(
        default=Path("~/.manyhats"),
        description="Folder for models, adapters, the registry and built kernels.",
    )
    model: str = Field(
        default="default",
        description="Base model: a local folder, a hub id, or 'default' (SmolLM2-135M-Instruct "
        "from PyPI).",
    )
    model_name: str | None = Field(
        default=None,
        description="Id under which the base is served; default: the folder's or hub id's name.",
    )
    revision: str | None = Field(
        default=None, description="Revision of a hub model; default: main."
    )
    quantization: Quantization = Field(
        default=Quantization.NF4, description="Base weights' format."
    )
    dtype: Dtype = Field(default=Dtype.BF16, description="Activations, KV cache and adapters.")
    device: Device = Field(default=Device.AUTO, description="auto takes CUDA where it is present.")
    kernels: Kernels = Field(default=Kernels.AUTO, description="Kernel backend.")
    cuda_graphs: bool = Field(
        default=True, description="Capture decode steps in CUDA graphs, where the kernels allow it."
    )
    layer_stack: bool = Field(
        default=True,
        description="On a CPU run steps of Llama-shaped bases in one native call.",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads for the engine; default: torch's own."
    )
