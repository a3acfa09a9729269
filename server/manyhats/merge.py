"""``manyhats merge``: the base with one adapter merged in, as a plain folder of transformers."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from transformers import AutoTokenizer

from manyhats.adapters.compose import compose
from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
from manyhats.adapters.formats import compile_adapter
from manyhats.adapters.names import CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.parts import CompiledAdapter
from manyhats.config import Quantization, Settings
from manyhats.engine.model.load import BaseModel, load_base, model_source, quiet_libraries
from manyhats.engine.model.merge import merge_adapter
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.errors import AdapterRejectedError, ConfigError, ModelNotFoundError
from manyhats.lifecycle.build import open_adapters, open_store
from manyhats.lifecycle.records import split_version
from manyhats.lifecycle.registry import Registry
from manyhats.types import CompositionKind, Digest


def merge(settings: Settings, adapter: str, out: Path) -> None:
    """Writes the base that ``settings`` names, not quantized and in their dtype, with ``adapter``
    merged in, to the new folder ``out``: configuration, safetensors and tokenizer.

    ``adapter`` is a folder with an adapter's two files, or the name (``name@version``) of one that
    is registered for this base; no server may hold the registry's file then.

    Raises:
        ConfigError: ``out`` is there already, the base cannot be loaded, the registry is in use.
        ModelNotFoundError: No adapter of that name.
        AdapterRejectedError: The adapter does not fit the base (the importers' reasons) or cannot
            be merged (``cannot_merge``).
    """
    quiet_libraries()
    if out.exists():
        raise ConfigError(f"out: {out} is there already", param="out")
    settings = settings.model_copy(update={"quantization": Quantization.NONE})
    source, _ = model_source(settings)
    base = load_base(settings)
    compiled = _compiled(settings, base, adapter)
    merge_adapter(base.module, base.spec, compiled)
    base.module.set_attn_implementation("eager")  # the server's own must not be asked for later
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "model"
        base.module.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, revision=settings.revision).save_pretrained(folder)
        folder.rename(out)


def _compiled(settings: Settings, base: BaseModel, adapter: str) -> CompiledAdapter:
    folder = Path(adapter)
    if (folder / CONFIG_NAME).is_file():
        return _compile(settings, base, folder)
    if settings.redis_url is None and not settings.registry_file(base.name).is_file():
        raise ModelNotFoundError(
            f"{adapter!r} is no folder with {CONFIG_NAME}, and no adapter is registered for "
            f"{base.name} in {settings.home}"
        )
    with ExitStack() as stack:
        kept = open_store(settings, base.name)
        registry = Registry(kept, max_versions=settings.max_adapters)
        stack.enter_context(closing(registry))
        store = stack.enter_context(closing(open_adapters(settings, base.name)))
        name, version = split_version(adapter)
        entry = registry.entry(name)
        # Whoever can read the registry's file may read whatever is in it, whosever it is.
        record = None if entry is None else entry.find(version or entry.route.stable)
        if record is None:
            raise ModelNotFoundError(
                f"{adapter!r} is no folder with {CONFIG_NAME} and no adapter registered for "
                f"{base.name}"
            )
        whole = record.ref.composition
        if whole is None:
            return _compile(settings, base, store.verified(record.ref.digest))
        if whole.kind is CompositionKind.ENSEMBLE:
            raise AdapterRejectedError(
                "cannot_merge",
                f"{record.ref} is an ensemble: several models, whose answers are averaged",
                param="adapter",
            )
        members = [_compile(settings, base, store.verified(m.digest)) for m in whole.members]
        return compose(record.ref, whole, members, AdapterLimits.of(settings))


def _compile(settings: Settings, base: BaseModel, folder: Path) -> CompiledAdapter:
    """In fp32: rounded once, when it has become part of a weight."""
    limits = AdapterLimits.of(settings)
    return compile_adapter(
        read_config_file(folder / CONFIG_NAME, limits),
        read_weights(folder / WEIGHTS_NAME, limits),
        base.spec,
        limits,
        digest=Digest(""),
        dtype=torch.float32,
        base_weights=LoadedWeights(site_modules(base.module, base.spec)),
    )
