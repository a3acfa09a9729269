"""Files of object stores, through fsspec and the store's own library (s3fs, gcsfs)."""

from __future__ import annotations

from typing import Any, Final

import fsspec

from manyhats.adapters.sources.partial import PartialFile
from manyhats.adapters.sources.progress import CancelledFetchError
from manyhats.errors import AdapterRejectedError, ManyhatsError, ServiceError

_CHUNK: Final = 1 << 20


class StoreFetcher:
    """Fetches files by their address. For one thread.

    Credentials and endpoint are the store's library's own: those of the server's environment.
    """

    def close(self) -> None:
        """Nothing is kept open."""

    def fetch(self, url: str, file: PartialFile) -> bool:
        """Bring ``file`` to the whole of what ``url`` names; False where there is no such thing.

        What is there of the same version is kept. Raises AdapterRejectedError
        ``source_unavailable`` (the library is not installed), ``too_large``; ServiceError.
        """
        try:
            system, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise AdapterRejectedError("source_unavailable", str(error), param="source") from error
        try:
            return self._fetch(system, path, file)
        except FileNotFoundError:
            return False
        except (ManyhatsError, CancelledFetchError):
            raise
        except Exception as error:  # each store's library has exceptions of its own
            raise ServiceError(f"{url} cannot be read: {error}", param="source") from error

    def _fetch(self, system: Any, path: str, file: PartialFile) -> bool:
        system.invalidate_cache()
        version, size = str(system.ukey(path)), int(system.info(path)["size"])
        resumed = file.version == version and 0 < file.size <= size
        file.begin(version, size, resumed=resumed)
        with system.open(path, "rb") as remote:
            remote.seek(file.size)
            while chunk := remote.read(_CHUNK):
                file.write(chunk)
        return True
