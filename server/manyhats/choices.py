"""Settings that are one of a few names."""

from __future__ import annotations

import enum


class Quantization(enum.StrEnum):
    """How the base's linear weights are kept."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"
    NONE = "none"


class Dtype(enum.StrEnum):
    """The dtype of activations, of the KV cache and of adapters on the device."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Device(enum.StrEnum):
    """Where the base model lives."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Kernels(enum.StrEnum):
    """The kernel backends by name; ``auto`` is the fastest that works here."""

    AUTO = "auto"
    REFERENCE = "reference"
    TORCH = "torch"
    NATIVE = "native"
    TRITON = "triton"


class LogLevel(enum.StrEnum):
    """What is logged: messages of this level and above."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(enum.StrEnum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"
