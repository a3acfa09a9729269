"""What the server says when it is up: where it answers, and three commands to try."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from manyhats.config import Settings
from manyhats.engine.interface import EngineClient


def announce(settings: Settings, port: int, engine: EngineClient, adapters: Sequence[str]) -> None:
    """Writes the address and three curl commands to standard output."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{port}"
    sys.stdout.write(banner(settings, address, engine, adapters))
    sys.stdout.flush()


def banner(settings: Settings, address: str, engine: EngineClient, adapters: Sequence[str]) -> str:
    """The text of ``announce``."""
    model = engine.model
    keys = bool(settings.api_keys or settings.admin_api_keys)
    key = ' -H "Authorization: Bearer $API_KEY"' if keys else ""
    how = f"{model.quantization}, {model.dtype}, {model.device}, kernels: {model.kernel_backend}"
    open_door = "" if keys else "No API key is configured: only this machine can connect.\n"
    shown = ", ".join(adapters[:12]) + (
        f" and {len(adapters) - 12} more" if len(adapters) > 12 else ""
    )
    chat = {
        "model": adapters[0] if adapters else model.id,
        "messages": [{"role": "user", "content": "What is a good way to spend a rainy afternoon?"}],
    }
    base = chat | {"model": model.id, "stream": True}
    return f"""
Manyhats serves {model.id} ({how}) at {address}
Adapters: {shown or "none yet"}
{open_door}
Try:
  curl {address}/v1/models{key}
  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{json.dumps(chat)}'
  curl -N {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{json.dumps(base)}'

"""
