"""Repositories of the Hugging Face hub, by its own library, which goes on where it was broken."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from manyhats.adapters.names import ADAPTERHUB_WEIGHTS_NAME, CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.sources.address import HubSource
from manyhats.adapters.sources.progress import Progress
from manyhats.errors import AdapterRejectedError, ServiceError

_WANTED = (CONFIG_NAME, WEIGHTS_NAME, ADAPTERHUB_WEIGHTS_NAME)


def fetch_hub(
    source: HubSource, folder: Path, bound: int, progress: Progress, endpoint: str | None
) -> None:
    """The adapter's files into ``folder``; sizes are known, and checked, before a byte is fetched.

    Raises AdapterRejectedError ``too_large``, ``source_refused`` (no such repository or commit, or
    it may not be read), ServiceError (the hub cannot be reached).
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def download(wanted: Sequence[str], *, dry_run: bool) -> list[tuple[str, int]]:
        found = snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=list(wanted),
            local_dir=folder,
            endpoint=endpoint,
            dry_run=dry_run,
            max_workers=1,
        )
        if not isinstance(found, list):
            return []
        # A size that the hub does not say is over every bound.
        return [(f.filename, bound + 1 if f.file_size is None else f.file_size) for f in found]

    try:
        sizes = dict(download(_WANTED, dry_run=True))
        if WEIGHTS_NAME in sizes:
            sizes.pop(ADAPTERHUB_WEIGHTS_NAME, None)
        for name, size in sizes.items():
            if size > bound:
                raise AdapterRejectedError(
                    "too_large",
                    f"{name} has {size} bytes, the bound is {bound} (max_adapter_mb)",
                    param="source",
                )
            progress.expect(size)
        for name, size in sizes.items():
            progress.check()
            download([name], dry_run=False)
            progress.add(size)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise ServiceError(f"the hub answers {status} for {source}", param="source") from error
        raise AdapterRejectedError(
            "source_refused", f"the hub answers {status} for {source}", param="source"
        ) from error
    except (OSError, httpx.HTTPError) as error:
        raise ServiceError(f"{source} cannot be fetched: {error}", param="source") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
