"""Why an adapter cannot be brought to the device, as a request is told."""

from __future__ import annotations

import logging

from manyhats.adapters.parts import CompiledAdapter
from manyhats.errors import AdapterLoadError, AdapterRejectedError, ManyhatsError
from manyhats.types import AdapterRef

logger = logging.getLogger(__name__)


def check_virtual_tokens(ref: AdapterRef, adapter: CompiledAdapter) -> None:
    """Raises AdapterLoadError where the adapter has not what it is registered with."""
    if adapter.virtual_tokens != ref.virtual_tokens:
        raise AdapterLoadError(
            f"adapter {ref} has {adapter.virtual_tokens} virtual tokens and is registered with "
            f"{ref.virtual_tokens}: register it again",
            param="model",
        )


def as_load_error(ref: AdapterRef, error: Exception) -> ManyhatsError:
    """What those are told who asked for ``ref``; what is not foreseen is logged as well."""
    if isinstance(error, AdapterLoadError):
        return error
    if isinstance(error, AdapterRejectedError) and ref.composition is not None:
        return error  # the members are fine, the caller put together what does not fit
    logger.exception("loading adapter %s", ref, exc_info=error)
    return AdapterLoadError(f"adapter {ref} cannot be loaded: {error}", param="model")
