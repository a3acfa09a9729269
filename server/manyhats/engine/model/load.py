"""Loads the base model: transformers' own classes, quantized by bitsandbytes, with our attention
put in.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: off
from manyhats.engine.model.lean import without_compiler  # before transformers

# isort: on
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from manyhats.adapters.parts import BaseSpec
from manyhats.config import Device, Dtype, Settings
from manyhats.engine.attention import AttentionShape
from manyhats.engine.model.attention import probe
from manyhats.engine.model.default import ensure_default_model
from manyhats.engine.model.digest import base_digest
from manyhats.engine.model.fourbit import read_four_bits
from manyhats.engine.model.fused import fuse
from manyhats.engine.model.inputs import SharedInputs
from manyhats.engine.model.quantized import (
    keep_copy,
    kept_copy,
    quantization_config,
    settle_cpu_layout,
)
from manyhats.engine.model.spec import describe
from manyhats.engine.model.tokenizer import ModelTokenizer
from manyhats.engine.model.weights import first_dequantization
from manyhats.engine.model.wiring import Blocks
from manyhats.errors import ConfigError
from manyhats_kernels import FourBit
from manyhats_kernels.dense import DenseOps

logger = logging.getLogger(__name__)

TORCH_DTYPES = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base model in memory. ``layers``: its attention modules in order and what their caches
    must hold; ``blocks``: the modules of its residual sites; ``shared``: which linear layers read
    the same input.
    """

    name: str
    module: PreTrainedModel
    tokenizer: ModelTokenizer
    spec: BaseSpec
    layers: list[tuple[nn.Module, AttentionShape]]
    blocks: Blocks
    shared: SharedInputs
    dtype: torch.dtype
    device: torch.device
    context_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    created: int


def load_base(settings: Settings, backend: object = None) -> BaseModel:
    """Loads what ``settings.model`` names; a ``backend`` that is ``FourBit`` multiplies 4 bits.

    Raises ConfigError where the model, its tokenizer, the quantization or the device cannot be had.
    """
    device = resolve_device(settings.device)
    dtype = TORCH_DTYPES[settings.dtype]
    source, name = model_source(settings)
    started = time.monotonic()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=settings.revision)
        config = AutoConfig.from_pretrained(source, revision=settings.revision)
        digest = base_digest(config, source, settings)
        with without_compiler():
            module = _load_module(settings, source, digest, dtype, device)
            first_dequantization(module)
        settle_cpu_layout(module, dtype)
        if isinstance(backend, FourBit):
            read_four_bits(module, backend)
        if device.type == "cpu" and isinstance(backend, DenseOps):
            logger.info("%d norms and MLPs in one pass each", fuse(module, backend))
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model: {source!r} cannot be loaded: {error}", param="model") from error
    base = wrap_base(
        module, tokenizer, name=name, digest=digest, dtype=dtype, max_context=settings.max_context
    )
    logger.info(
        "base model %s (%s, %s on %s) in %.1f s",
        name,
        settings.quantization.value,
        settings.dtype.value,
        device,
        time.monotonic() - started,
    )
    return base


def _load_module(
    settings: Settings, source: str, digest: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    kept = kept_copy(settings.home, digest)
    if kept is not None:
        # Carries its own quantization config.
        return AutoModelForCausalLM.from_pretrained(
            kept, dtype=dtype, device_map={"": device}
        ).eval()
    module = AutoModelForCausalLM.from_pretrained(
        source,
        revision=settings.revision,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        **quantization_config(settings.quantization, dtype),
    ).eval()
    keep_copy(module, settings.quantization, settings.home, digest)
    return module


def wrap_base(
    module: PreTrainedModel,
    tokenizer: Any,
    *,
    name: str,
    digest: str,
    dtype: torch.dtype,
    max_context: int | None = None,
) -> BaseModel:
    """Probes and describes a model in memory; its attention is ours from then on."""
    config = module.config.get_text_config()
    limit = int(config.max_position_embeddings)
    if max_context is not None and max_context > limit:
        raise ConfigError(
            f"max_context: {max_context} is over the model's own {limit} tokens",
            param="max_context",
        )
    wrapped = ModelTokenizer(tokenizer)
    probed = probe(module)
    spec = describe(module, digest, probed.layers, probed.blocks)
    return BaseModel(
        name=name,
        module=module,
        tokenizer=wrapped,
        spec=spec,
        layers=probed.layers,
        blocks=probed.blocks,
        shared=probed.shared,
        dtype=dtype,
        device=module.device,
        context_len=max_context or limit,
        vocab_size=int(config.vocab_size),
        eos_token_ids=_eos_token_ids(module, wrapped),
        created=int(time.time()),
    )


def resolve_device(device: Device) -> torch.device:
    """The torch device of the setting. Raises ConfigError for CUDA where there is none."""
    if device is Device.CPU or (device is Device.AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device: cuda was asked for and this torch ({torch.__version__}) sees none",
            param="device",
        )
    return torch.device("cuda", torch.cuda.current_device())


def model_source(settings: Settings) -> tuple[str, str]:
    """Where to load from, and under which name to serve it."""
    if settings.model == "default":
        path = ensure_default_model(settings.home)
        return str(path), settings.model_name or path.name
    path = Path(settings.model).expanduser()
    if path.is_dir():
        return str(path.resolve()), settings.model_name or path.resolve().name
    return settings.model, settings.model_name or settings.model


def _eos_token_ids(module: PreTrainedModel, tokenizer: ModelTokenizer) -> frozenset[int]:
    generation = getattr(module, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(int(i) for i in ids)


def quiet_libraries() -> None:
    """Keeps transformers' own progress and advice out of the server's log."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
