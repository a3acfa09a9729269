"""Every error that a caller of Manyhats can meet.

::

    ManyhatsError
    ├── ConfigError                    500  bad_configuration   the server does not start
    ├── RequestError                   400  invalid_request     the caller's; `param`: the field
    │   ├── ContextLengthError         400  context_length_exceeded
    │   ├── BodyTooLargeError          413  body_too_large
    │   ├── ContentTypeError           415  unsupported_content_type
    │   ├── AuthenticationError        401  invalid_api_key
    │   ├── PermissionDeniedError      403  permission_denied
    │   ├── ModelNotFoundError         404  model_not_found
    │   ├── NotFoundError              404  not_found
    │   ├── AdapterRejectedError       400  adapter_rejected    `reason`: the machine-readable code
    │   └── ConflictError              409  conflict
    └── ServiceError                   503  service_unavailable `retryable` is true
        ├── QueueFullError             429  queue_full          `retry_after_s`: Retry-After
        ├── QuotaExceededError         429  quota_exceeded      `param` names the quota
        ├── DeadlineExceededError      504  deadline_exceeded   the request's own time is up
        ├── DrainingError              503  draining
        ├── AdapterLoadError           503  adapter_load_failed this adapter alone
        └── EngineFailedError          500  engine_failed       the step that held the request

A class carries its HTTP status, its code, whether the same call may succeed later, and the ``type``
of OpenAI's error shape. ``message`` is written for the caller: it names the field and the bound.
"""

from __future__ import annotations

from typing import ClassVar


class ManyhatsError(Exception):
    """Base of the tree; see the module's docstring."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(ManyhatsError):
    """A setting is wrong or impossible here; the server refuses to start."""

    code = "bad_configuration"


class RequestError(ManyhatsError):
    """The caller's mistake. ``param`` names the field, the message names the bound."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class ContextLengthError(RequestError):
    """Prompt (plus what was asked for) does not fit the model's context."""

    code = "context_length_exceeded"


class BodyTooLargeError(RequestError):
    """The request body is over the bound; refused before it is read whole."""

    status = 413
    code = "body_too_large"


class ContentTypeError(RequestError):
    """The request body's content type is not the one that the route takes."""

    status = 415
    code = "unsupported_content_type"


class AuthenticationError(RequestError):
    """No API key, or one that is not known."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class PermissionDeniedError(RequestError):
    """The key is known and may not do this."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class ModelNotFoundError(RequestError):
    """No base, adapter or version of that name; the message lists near names."""

    status = 404
    code = "model_not_found"
    type = "not_found_error"


class NotFoundError(RequestError):
    """No tenant, key or other thing of that id."""

    status = 404
    code = "not_found"
    type = "not_found_error"


class ConflictError(RequestError):
    """The state of the named thing does not allow this now."""

    status = 409
    code = "conflict"
    type = "conflict_error"


class AdapterRejectedError(RequestError):
    """An adapter that cannot be served exactly, with the reason.

    ``reason`` is a stable machine-readable code: ``unsupported_family``, ``unsupported_feature``,
    ``unsupported_site``, ``no_module_matched``, ``unused_tensors``, ``missing_tensors``,
    ``shape_mismatch``, ``rank_too_large``, ``unsupported_dtype``, ``non_finite``, ``bad_header``,
    ``bad_config``, ``pickle_refused``, ``too_large``, ``path_not_allowed``, ``missing_file``,
    ``cannot_compose``, ``cannot_merge``, ``parity_mismatch``, ``bad_source``,
    ``source_not_allowed``, ``source_refused``, ``source_unavailable``, ``digest_mismatch``.
    """

    code = "adapter_rejected"

    def __init__(self, reason: str, message: str, *, param: str | None = None) -> None:
        super().__init__(f"{reason}: {message}", param=param)
        self.reason = reason


class ServiceError(ManyhatsError):
    """The server's state, not the caller's mistake; the same call may succeed later."""

    status = 503
    code = "service_unavailable"
    type = "server_error"
    retryable = True

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class QueueFullError(ServiceError):
    """The bounded queue is full."""

    status = 429
    code = "queue_full"
    type = "rate_limit_error"


class QuotaExceededError(ServiceError):
    """The tenant has used up a quota, which ``param`` names."""

    status = 429
    code = "quota_exceeded"
    type = "rate_limit_error"


class DeadlineExceededError(ServiceError):
    """The request was not done in the time that it was given."""

    status = 504
    code = "deadline_exceeded"
    type = "timeout_error"


class DrainingError(ServiceError):
    """The server is shutting down and takes no new request."""

    code = "draining"


class AdapterLoadError(ServiceError):
    """This adapter could not be brought to the device; every other one goes on."""

    code = "adapter_load_failed"


class EngineFailedError(ServiceError):
    """The step that held this request failed; the message says why."""

    status = 500
    code = "engine_failed"
