"""Every setting, typed and frozen. The only reader of the environment.

Each field is a flag of ``manyhats serve`` (``--max-rank``) and a variable (``MANYHATS_MAX_RANK``);
a flag wins.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from manyhats.choices import Device, Dtype, Kernels, LogFormat, LogLevel, Quantization
from manyhats.model_settings import ModelSettings
from manyhats.secret_files import with_secret_files

__all__ = [
    "CLIENT_VARIABLES",
    "Device",
    "Dtype",
    "Kernels",
    "LogFormat",
    "LogLevel",
    "Quantization",
    "Settings",
    "unknown_variables",
]

CLIENT_VARIABLES = frozenset({"MANYHATS_URL", "MANYHATS_KEY"})
"""Variables of the commands that speak to a running server; no settings of a server."""


class Settings(ModelSettings):
    """The server's settings; sizes say their unit in their name or description."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port; 0 takes a free one.")
    admin_api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="API keys with the admin role (comma-separated in the environment)."
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="API keys with the tenant role (comma-separated in the environment).",
    )
    admin_api_keys_file: Path | None = Field(
        default=None, description="File with admin keys, one a line, beside --admin-api-keys."
    )
    api_keys_file: Path | None = Field(
        default=None, description="File with tenant keys, one a line, beside --api-keys."
    )
    redis_url: SecretStr | None = Field(
        default=None,
        description="Redis that replicas share: registry, tenants, keys, quotas, usage and drift "
        "(redis://host/0).",
    )
    store: Path | None = Field(
        default=None,
        description="Folder of the adapters' bytes, which replicas share; default: in the home.",
    )
    keep_retired_days: float | None = Field(
        default=None, ge=0, description="Days that a retired version is kept; default: for ever."
    )
    keep_deleted_s: float = Field(
        default=0.0,
        ge=0,
        description="Seconds that a deleted version's bytes are kept, for requests that run on "
        "other replicas.",
    )
    gc_period_s: float = Field(
        default=3600.0, ge=0, description="Seconds between two collections of those; 0: never."
    )
    usage_days: int = Field(
        default=400, ge=1, le=3660, description="Days that the tenants' usage is kept."
    )
    redis_url_file: Path | None = Field(
        default=None, description="File with the Redis URL, in the place of --redis-url."
    )
    metrics_open: bool = Field(
        default=False, description="Show /metrics without a key, where keys are configured."
    )
    docs_open: bool = Field(
        default=False,
        description="Show /docs, /redoc and /openapi.json, where keys are configured.",
    )
    adapter_root: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(),
        description="Folders that adapters may be registered from (':'-separated in the "
        "environment).",
    )
    register_roots: bool = Field(
        default=False,
        description="Register every adapter folder found directly under the adapter roots at "
        "start-up.",
    )
    source_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Prefixes that adapters may be fetched from (https://host/path/, s3://bucket/, "
        "hf://org/), and networks that their names may lead to (10.0.0.0/8); comma-separated in "
        "the environment. Default: none.",
    )
    source_workers: int = Field(default=2, ge=1, le=64, description="Fetches of adapters at once.")
    hub_endpoint: str | None = Field(
        default=None, description="Address of the hub; default the hub library's (HF_ENDPOINT)."
    )

    slots: int = Field(
        default=32, ge=1, le=4096, description="Adapters resident on the device at once."
    )
    max_rank: int = Field(default=64, ge=1, le=1024, description="Largest LoRA rank accepted.")
    pool_rows: int | None = Field(
        default=None,
        ge=1,
        description="Rank rows per site on the device; default max(16 * slots, max_rank).",
    )
    override_mb: int = Field(
        default=256,
        ge=1,
        description="Whole tensors of adapters on the device, MiB: replaced rows and weights, "
        "prefixes, soft prompts.",
    )
    host_cache_mb: int = Field(default=1024, ge=1, description="Host tier for adapters, MiB.")
    max_adapter_mb: int = Field(default=512, ge=1, description="Largest adapter accepted, MiB.")
    max_virtual_tokens: int = Field(
        default=512, ge=0, le=65536, description="Virtual tokens of a prompt or prefix adapter."
    )
    max_dense_mb: int = Field(
        default=256, ge=0, description="Weights that one adapter replaces whole, MiB."
    )
    max_conversion_error: float = Field(
        default=1e-3,
        ge=0,
        le=1,
        description="Relative error up to which a weight change is approximated by a low-rank one.",
    )
    parity_probe: bool = Field(
        default=True,
        description="At registration, compare the adapter in the engine with plain arithmetic.",
    )
    max_adapters: int = Field(default=10_000, ge=1, description="Registered adapters.")

    adapter_layers: bool = Field(
        default=True,
        description="Build the adapter layers; without them only the base is served (to measure "
        "what they cost).",
    )
    max_context: int | None = Field(
        default=None, ge=16, description="Context bound, tokens; default the model's."
    )
    kv_cache_mb: int | None = Field(
        default=None,
        ge=1,
        description="KV cache, MiB; default: 80 % of the GPU's free memory, on a CPU a quarter of "
        "the machine's, at most 4096, which it takes as blocks are used.",
    )
    kv_cache_blocks: int | None = Field(
        default=None, ge=1, description="KV cache, blocks; takes the place of kv_cache_mb."
    )
    block_size: int = Field(default=16, ge=1, le=256, description="Tokens in a KV block.")
    prefix_cache: bool = Field(
        default=True, description="Reuse KV blocks of equal prefixes (same adapter, same tenant)."
    )
    max_num_seqs: int = Field(default=64, ge=1, le=4096, description="Sequences in one step.")
    max_step_tokens: int = Field(
        default=512, ge=1, description="Tokens in one step (prefill is cut into chunks)."
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that a request may take which names none (x-manyhats-timeout); "
        "default: any.",
    )
    max_timeout_s: float = Field(
        default=86_400.0, gt=0, description="Bound of x-manyhats-timeout, seconds."
    )
    max_queue: int = Field(default=1024, ge=1, description="Sequences that may wait; over it 429.")
    max_background: int = Field(
        default=64,
        ge=1,
        description="Background sequences (evaluations, probes) that may wait; over it 429.",
    )
    background_tokens: int = Field(
        default=128,
        ge=1,
        description="Tokens that background sequences compute in a step beside live ones.",
    )
    compare_mb: int = Field(
        default=64,
        ge=1,
        description="Logits kept to compare versions over one answer, MiB (bounds its length); "
        "as much again for live answers that will be compared.",
    )
    input_price: float = Field(
        default=1.0, ge=0, le=1e6, description="A prompt token's cost in a tenant's share."
    )
    output_price: float = Field(
        default=2.0, gt=0, le=1e6, description="A generated token's cost in a tenant's share."
    )

    max_body_kb: int = Field(default=1024, ge=1, description="JSON body bound, KiB.")
    max_n: int = Field(default=16, ge=1, description="Bound of n.")
    max_stops: int = Field(
        default=8, ge=1, description="Bound of stop strings (and of each one's length: 256)."
    )
    max_logprobs: int = Field(default=20, ge=0, description="Bound of logprobs / top_logprobs.")
    default_max_tokens: int = Field(
        default=256, ge=1, description="max_tokens of a chat request that names none."
    )
    drain_s: float = Field(
        default=30.0, ge=0, description="Seconds that SIGTERM waits for running requests."
    )
    drain_grace_s: float = Field(
        default=0.0,
        ge=0,
        le=600,
        description="Seconds from SIGTERM, when /readyz goes down, until new requests are refused.",
    )
    prefetch_hot: int = Field(
        default=32,
        ge=0,
        le=4096,
        description="Hot adapters of the last run that a start prefetches; 0: none.",
    )
    metrics_adapters: int = Field(
        default=200,
        ge=1,
        description="Adapters with a label of their own in /metrics; the rest are 'other'.",
    )
    metrics_tenants: int = Field(
        default=200,
        ge=1,
        description="Tenants with a label of their own in /metrics; the rest are 'other'.",
    )
    drift: bool = Field(
        default=True,
        description="Watch each adapter's traffic for drift; docs/drift.md has it all.",
    )
    drift_alpha: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Probability of ever raising a false alarm, on any adapter and signal.",
    )
    drift_share: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Share of requests that the bare base scores again, in idle steps.",
    )
    drift_canary_share: float = Field(
        default=0.2, ge=0, le=1, description="The same share of a canary's requests."
    )
    drift_warm_up: int = Field(
        default=20, ge=0, description="First requests of a version that its reference leaves out."
    )
    drift_reference: int = Field(
        default=300,
        ge=16,
        le=100_000,
        description="Requests that a version's reference is made of.",
    )
    drift_small_reference: int = Field(
        default=64, ge=16, le=100_000, description="Likewise of rescored requests and of feedback."
    )
    drift_window: int = Field(
        default=256, ge=16, le=65536, description="Requests in the window compared with it."
    )
    drift_small_window: int = Field(
        default=64, ge=16, le=65536, description="Likewise rescored ones, feedback, a canary's."
    )
    drift_webhook_url: str | None = Field(
        default=None, description="Where alarms are sent, as signed POSTs."
    )
    drift_webhook_secret: SecretStr | None = Field(
        default=None, description="Key of the signatures (HMAC-SHA256)."
    )
    log_level: LogLevel = Field(default=LogLevel.INFO, description="Least level that is logged.")
    log_format: LogFormat = Field(
        default=LogFormat.TEXT, description="Log lines for people, or one JSON object a line."
    )
    otel_endpoint: str | None = Field(
        default=None,
        description="Collector that OpenTelemetry traces and metrics go to (OTLP over HTTP, "
        "http://host:4318); default: what the OTEL_* variables say, or none.",
    )

    @field_validator("home", "store")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().resolve()

    @field_validator("admin_api_keys", "api_keys", "source_allow", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return tuple(v for v in value.split(",") if v) if isinstance(value, str) else value

    @field_validator("adapter_root", mode="before")
    @classmethod
    def _split_colons(cls, value: object) -> object:
        return tuple(v for v in value.split(":") if v) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, given: Any) -> Any:
        """Secrets as files (of Docker or Kubernetes, say): read once, at start."""
        return with_secret_files(given) if isinstance(given, dict) else given

    def base_folder(self, base_id: str) -> Path:
        """Where what belongs to one base lies: its registry and its adapters' bytes."""
        return self.home / "bases" / re.sub(r"[^A-Za-z0-9._-]+", "--", base_id)

    def registry_file(self, base_id: str) -> Path:
        """The SQLite file of one base's registry, tenants and usage."""
        return self.base_folder(base_id) / "registry.sqlite"

    def adapter_folder(self, base_id: str) -> Path:
        """Where the bytes of one base's adapters lie."""
        own = self.base_folder(base_id)
        return own / "adapters" if self.store is None else self.store / own.name

    @property
    def rows(self) -> int:
        """Rank rows per site on the device."""
        return self.pool_rows if self.pool_rows is not None else max(16 * self.slots, self.max_rank)


def otel_variable(name: str) -> str:
    """One of OpenTelemetry's standard variables; empty where it is not set."""
    return os.environ.get(f"OTEL_{name}", "").strip()


def unknown_variables() -> list[str]:
    """MANYHATS_* variables of the environment that no setting reads: misspelt ones, most likely."""
    prefix = str(Settings.model_config["env_prefix"])
    known = {prefix + name.upper() for name in Settings.model_fields} | CLIENT_VARIABLES
    return sorted(v for v in os.environ if v.startswith(prefix) and v.upper() not in known)
