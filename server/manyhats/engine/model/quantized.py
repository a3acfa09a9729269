"""Quantized weights, made once: bitsandbytes takes seconds to minutes to quantize on a CPU, and no
time to read.

Kept under ``home/quantized/<base digest>`` as transformers writes them (safetensors), so any later
start reads 4-bit weights straight into memory.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from manyhats.config import Quantization

logger = logging.getLogger(__name__)

_KEPT = frozenset({Quantization.NF4, Quantization.FP4})


def quantization_config(kind: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` for the quantization; empty for none."""
    if kind is Quantization.NONE:
        return {}
    if kind is Quantization.INT8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind.value, bnb_4bit_compute_dtype=dtype
        )
    }


def settle_cpu_layout(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights where its CPU kernel would be wrong or would
    fail.

    That kernel rounds activations to bf16 whatever their dtype, and takes only outputs that are a
    multiple of 32; elsewhere the weights are dequantized and multiplied in ``dtype``.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and (
            dtype != torch.bfloat16 or module.out_features % 32 or module.in_features % 64
        ):
            module.support_avx512bf16_for_cpu = False


def kept_copy(home: Path, digest: str) -> Path | None:
    """Folder of the quantized copy of a base, if there is one."""
    folder = home / "quantized" / digest
    return folder if folder.is_dir() else None


def keep_copy(model: PreTrainedModel, kind: Quantization, home: Path, digest: str) -> None:
    """Writes the quantized copy for the next start; must come before the model's first forward
    pass.

    A full disk only costs the next start its time, so an OSError is logged and let go.
    """
    if kind not in _KEPT or kept_copy(home, digest) is not None:
        return
    parent = home / "quantized"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    try:
        model.save_pretrained(folder)
        folder.replace(parent / digest)
    except OSError as error:
        logger.warning("the quantized weights could not be kept under %s: %s", parent, error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
