"""What ``finetune.py`` asks of a running server: register, evaluate, canary."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

POLL_S = 1.0


class RefusedError(Exception):
    """The server's own words for why not."""


def call(server: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    """The JSON answer. Raises RefusedError; httpx.HTTPError where there is no answer."""
    answer = server.request(method, path, **options)
    try:
        body: dict[str, Any] = answer.json()
        if answer.is_success:
            return body
        message = body["error"]["message"]
    except (ValueError, TypeError, KeyError) as error:
        raise RefusedError(f"{server.base_url} is no Manyhats server: {answer.status_code}") from (
            error
        )
    raise RefusedError(message)


def register(
    server: httpx.Client,
    name: str,
    folder: Path,
    *,
    probes: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, str],
    promote: bool | None,
) -> dict[str, Any]:
    """Uploads what PEFT saved, as the next version of ``name``; ``probes`` are the pairs of prompt
    and completion that its versions are evaluated on, ``promote`` as in the API.
    """
    said = {
        "name": name,
        "metadata": json.dumps(metadata),
        "evaluation": "\n".join(json.dumps(probe) for probe in probes),
    }
    if promote is not None:
        said["promote"] = json.dumps(promote)
    with (
        (folder / "adapter_config.json").open("rb") as config,
        (folder / "adapter_model.safetensors").open("rb") as weights,
    ):
        files = {"config": config, "weights": weights}
        return call(server, "POST", "/admin/adapters", data=said, files=files)


def evaluate(server: httpx.Client, name: str, version: int) -> dict[str, Any]:
    """The report of an evaluation, with a bar while it runs. Raises RefusedError where it fails."""
    path = f"/admin/adapters/{name}"
    job = call(server, "POST", f"{path}/evaluate", json={"version": version})
    with tqdm(total=job["total"], desc=f"evaluating {job['adapter']}", unit="probe") as bar:
        while True:
            found = call(server, "GET", f"{path}/versions/{version}/evaluation")
            if found["state"] != "evaluating":
                break
            bar.update(found["job"]["done"] - bar.n)
            time.sleep(POLL_S)
        bar.update(bar.total - bar.n)
    if found.get("job"):
        raise RefusedError(f"{job['adapter']}: {found['job']['error']}")
    report: dict[str, Any] = found["report"]
    return report


def canary(server: httpx.Client, name: str, version: int, percent: float) -> dict[str, Any]:
    """The route, once the version gets its share of the callers."""
    body = {"version": version, "percent": percent, "reason": "fine-tuned"}
    return call(server, "POST", f"/admin/adapters/{name}/canary", json=body)
