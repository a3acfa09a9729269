"""An adapter in a bucket of an object store, and what every such store must do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from manyhats.adapters.sources.address import AllowList, UrlSource
from manyhats.adapters.sources.fetch import Fetcher
from manyhats.adapters.sources.progress import Progress
from manyhats.errors import AdapterRejectedError

CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS_PATH = "models/adapters/a/adapter_model.safetensors"


@dataclass(frozen=True)
class Bucket:
    """The bucket ``models`` of a store that addresses of ``scheme`` name; it has one adapter, whose
    file of weights is ``weights``.
    """

    scheme: str
    weights: bytes

    @property
    def prefix(self) -> str:
        """All that is allowed."""
        return f"{self.scheme}://models/adapters/"

    def fill(self, put: Callable[[str, bytes], object]) -> None:
        """Puts the adapter there: ``put`` takes a path and its content."""
        put("models/adapters/a/adapter_config.json", CONFIG)
        put(WEIGHTS_PATH, self.weights)

    def fetch(
        self,
        folder: Path,
        url: str | None = None,
        progress: Progress | None = None,
        bound: int | None = None,
    ) -> tuple[bytes, ...]:
        """The files of ``url`` (None: the adapter), as they came. ``bound``: the most bytes that
        are taken (None: more than there are).
        """
        folder.mkdir(exist_ok=True)
        most = len(self.weights) + (1 << 18) if bound is None else bound
        fetcher = Fetcher(AllowList([self.prefix]), most)
        source = UrlSource(self.prefix + "a" if url is None else url)
        paths = fetcher.fetch(source, folder, progress or Progress())
        return tuple(path.read_bytes() for path in paths)

    def comes_whole(self, folder: Path) -> None:
        """Every byte comes, and the progress tells so."""
        progress = Progress()
        assert self.fetch(folder, progress=progress) == (CONFIG, self.weights)
        assert progress.done == progress.total == len(CONFIG) + len(self.weights)

    def refuses_by_name(self, folder: Path) -> None:
        """What is not there, not allowed or too large is refused, each with its reason."""
        for url, bound, reason in (
            (self.prefix + "none", None, "missing_file"),
            (f"{self.scheme}://other/adapters/a", None, "source_not_allowed"),
            (self.prefix + "a", len(self.weights) // 2, "too_large"),
        ):
            with pytest.raises(AdapterRejectedError) as refusal:
                self.fetch(folder, url, bound=bound)
            assert refusal.value.reason == reason, refusal.value.message
