"""The residency of an engine that was built without adapter layers."""

from __future__ import annotations

from manyhats.errors import AdapterLoadError
from manyhats.scheduler.residency import Admission, Failed
from manyhats.types import AdapterRef, Sequence


class NoAdapters:
    """The ``Residency`` of an engine built without adapter layers: every adapter fails."""

    def prepare(self, seq: Sequence) -> Admission:
        """Failed, always."""
        return Failed(
            AdapterLoadError(
                f"adapter {seq.adapter} cannot be served: this server was started without adapter "
                "layers",
                param="model",
            )
        )

    acquire = prepare

    def release(self, seq: Sequence) -> None:
        """Nothing is ever leased."""

    def cancel(self, seq: Sequence) -> None:
        """Nothing ever waits."""

    def prefetch(self, ref: AdapterRef) -> None:
        """Nothing is ever loaded."""

    def pin(self, ref: AdapterRef) -> None:
        """There is no device to keep anything on."""

    def unpin(self, ref: AdapterRef) -> None:
        """Nothing was kept."""

    def drop(self, ref: AdapterRef) -> None:
        """Nothing was loaded."""
