"""An adapter's files from wherever a source says into a folder of this machine."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from manyhats.adapters.names import ADAPTERHUB_WEIGHTS_NAME, CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.sources.address import WEB_SCHEMES, AllowList, HubSource, Source, UrlSource
from manyhats.adapters.sources.hub import fetch_hub
from manyhats.adapters.sources.partial import PartialFile, check_digest
from manyhats.adapters.sources.progress import Progress
from manyhats.adapters.sources.stores import StoreFetcher
from manyhats.adapters.sources.web import WebFetcher
from manyhats.adapters.staging import MAX_CONFIG_BYTES
from manyhats.errors import AdapterRejectedError


class _FileFetcher(Protocol):
    def fetch(self, url: str, file: PartialFile) -> bool: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches what ``allow`` names. ``max_bytes`` bounds the weights; ``endpoint`` is the hub's
    (None: its library's own). Thread-safe.
    """

    allow: AllowList
    max_bytes: int
    endpoint: str | None = None

    def fetch(self, source: Source, folder: Path, progress: Progress) -> tuple[Path, Path]:
        """Configuration and weights below ``folder``, which exists. What an earlier fetch of the
        same source left there is not fetched again where the source says that it is the same.

        Raises AdapterRejectedError (``bad_source``, ``source_not_allowed``, ``source_refused``,
        ``source_unavailable``, ``missing_file``, ``too_large``, ``digest_mismatch``), ServiceError
        (may succeed later), CancelledFetchError.
        """
        self.allow.check(source)
        if isinstance(source, HubSource):
            fetch_hub(source, folder, self.max_bytes, progress, self.endpoint)
        else:
            web = source.url.partition(":")[0].lower() in WEB_SCHEMES
            with closing(WebFetcher(self.allow) if web else StoreFetcher()) as fetcher:
                self._fetch_url(fetcher, source, folder, progress)
        for name in (WEIGHTS_NAME, ADAPTERHUB_WEIGHTS_NAME):
            if (folder / name).is_file():
                break
        for path in (folder / CONFIG_NAME, folder / name):
            if not path.is_file():
                raise AdapterRejectedError(
                    "missing_file", f"{source} has no {path.name}", param="source"
                )
        if isinstance(source, UrlSource):
            check_digest(folder / name, source.sha256)
        return folder / CONFIG_NAME, folder / name

    def _fetch_url(
        self, fetcher: _FileFetcher, source: UrlSource, folder: Path, progress: Progress
    ) -> None:
        if not self._fetch_file(fetcher, source, CONFIG_NAME, MAX_CONFIG_BYTES, folder, progress):
            return
        for name in (WEIGHTS_NAME, ADAPTERHUB_WEIGHTS_NAME):
            if self._fetch_file(fetcher, source, name, self.max_bytes, folder, progress):
                return

    def _fetch_file(
        self,
        fetcher: _FileFetcher,
        source: UrlSource,
        name: str,
        bound: int,
        folder: Path,
        progress: Progress,
    ) -> bool:
        progress.check()
        with PartialFile(folder, name, bound, progress) as file:
            found = fetcher.fetch(f"{source.url.rstrip('/')}/{name}", file)
            if found:
                file.finish()
        if not found:
            file.discard()
        return found
