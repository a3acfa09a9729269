"""The base model's digest: what its KV blocks, its adapters and its quantized copy are keyed by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedConfig

from manyhats.config import Settings


def base_digest(config: PreTrainedConfig, source: str, settings: Settings) -> str:
    """SHA-256 over the weights' identity and how they are held (quantization, dtype).

    For a local folder the identity is each weight file's content (remembered by path, size and time
    under ``home``, since a large model takes long to read); for a hub model its name and commit,
    which the hub guarantees.
    """
    folder = Path(source)
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".json"})
        identity = [[p.name, _file_digest(p, settings.home)] for p in files]
    else:
        commit = getattr(config, "_commit_hash", None) or settings.revision or "main"
        identity = [[source, str(commit)]]
    text = json.dumps([identity, settings.quantization.value, settings.dtype.value])
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path, home: Path) -> str:
    stat = path.stat()
    key = f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    note = home / "digests" / hashlib.sha256(key.encode()).hexdigest()
    if note.is_file():
        return note.read_text().strip()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = note.with_suffix(".tmp")
    temporary.write_text(digest)
    temporary.replace(note)
    return digest
