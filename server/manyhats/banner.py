"""What the server says when it is up: where it answers, and three commands to try."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from manyhats.config import Settings
from manyhats.engine.interface import EngineClient
from manyhats.tenancy.directory import TenantDirectory


def announce(
    settings: Settings,
    port: int,
    engine: EngineClient,
    tenants: TenantDirectory,
    adapters: Sequence[str],
) -> None:
    """Writes the address, which keys there are and three curl commands to standard output."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{port}"
    sys.stdout.write(banner(settings, address, engine, tenants, adapters))
    sys.stdout.flush()


def banner(
    settings: Settings,
    address: str,
    engine: EngineClient,
    tenants: TenantDirectory,
    adapters: Sequence[str],
) -> str:
    """The text of ``announce``."""
    model = engine.model
    is_open, keys = _keys(settings, tenants)
    key = "" if is_open else ' -H "Authorization: Bearer $API_KEY"'
    how = f"{model.quantization}, {model.dtype}, {model.device}, kernels: {model.kernel_backend}"
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
{keys}

Try:
  curl {address}/v1/models{key}
  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{json.dumps(chat)}'
  curl -N {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{json.dumps(base)}'

"""


def _keys(settings: Settings, tenants: TenantDirectory) -> tuple[bool, str]:
    """(Whether calls need none, which API keys there are): numbers alone, never a key."""
    given = len(settings.admin_api_keys) + len(settings.api_keys)
    usable, issued = tenants.key_counts
    if not given and not issued:
        return True, "No API key is configured: only this machine can connect."
    if not given and not usable:
        return False, (
            f"API keys: none that can be used, all {issued} issued ones are revoked or expired; "
            "start with --admin-api-keys to issue others"
        )
    ended = f" ({issued - usable} more are revoked or expired)" if issued > usable else ""
    return False, f"API keys: {given} in the settings, {usable} issued{ended}"
