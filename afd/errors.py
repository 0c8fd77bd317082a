"""The one tree of errors. Callers decide by kind, never by message.

AfdError
├── InvalidRequest      the caller's fault; retrying cannot help    INVALID_ARGUMENT      400
├── Unauthenticated     no valid API key                            UNAUTHENTICATED       401
├── PermissionDenied    known, but not allowed                      PERMISSION_DENIED     403
├── NotFound            no such model or request                    NOT_FOUND             404
├── Cancelled           somebody cancelled the request              CANCELLED             499
├── Overloaded          no room now; retry later                    RESOURCE_EXHAUSTED    429
├── PeerUnavailable     a peer is gone; safe to retry elsewhere     UNAVAILABLE           503
├── DeadlineExceeded    the time budget is spent                    DEADLINE_EXCEEDED     504
├── Mismatch            two parts that do not belong together       FAILED_PRECONDITION   500
│   ├── StaleEpoch      the caller no longer owns what it writes    FAILED_PRECONDITION   409
│   └── TransportUnavailable  a pair cannot move its tensors so
├── ConfigError         a setting, file or port that cannot work    (ends the process)
│   └── CheckpointError a model directory that cannot be served
└── InternalError       a fault of ours                             INTERNAL              500
    └── JournalGap      Redis has lost tokens that were journaled
"""

from __future__ import annotations


class AfdError(Exception):
    """Base of everything this project raises on purpose. The message is one sentence for people.

    `retry_after_s` is how long to wait before the same request can succeed, where that is known.
    """

    grpc_code = "INTERNAL"
    http_status = 500

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InvalidRequest(AfdError):
    """The request itself is wrong; `param` names the field at fault, if one is."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unauthenticated(AfdError):
    """No API key where one is needed, or one that is not valid."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(AfdError):
    """The caller is who it says it is, but this is not for its role."""

    grpc_code = "PERMISSION_DENIED"
    http_status = 403


class NotFound(AfdError):
    """No model, request or route of that name."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class Cancelled(AfdError):
    """The request was cancelled before its end."""

    grpc_code = "CANCELLED"
    http_status = 499


class Overloaded(AfdError):
    """No room now; the same request can succeed later."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429


class PeerUnavailable(AfdError):
    """A peer is gone or does not answer; safe to retry elsewhere."""

    grpc_code = "UNAVAILABLE"
    http_status = 503


class DeadlineExceeded(AfdError):
    """The time budget of the request is spent."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class Mismatch(AfdError):
    """Two parts of the mesh that do not belong together; the message names both values."""

    grpc_code = "FAILED_PRECONDITION"


class StaleEpoch(Mismatch):
    """A newer owner has taken over what the caller tried to write."""

    http_status = 409


class TransportUnavailable(Mismatch):
    """This attention-FFN pair cannot move its tensors in the way that was asked for; another one may do."""


class ConfigError(AfdError):
    """A setting, file or port that cannot work; the process ends with this sentence."""


class CheckpointError(ConfigError):
    """A model directory that cannot be served."""


class InternalError(AfdError):
    """A fault of ours."""


class JournalGap(InternalError):
    """Redis has lost tokens that were journaled; `num_tokens` of the journal are left."""

    def __init__(self, message: str, num_tokens: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens


def error_for_grpc_code(
    code: str, message: str, retry_after_s: float | None = None, param: str | None = None
) -> AfdError:
    """The error of the tree that a gRPC status (its name, as "UNAVAILABLE") stands for."""
    error = _BY_GRPC_CODE.get(code, InternalError)(message)
    error.retry_after_s = retry_after_s
    if isinstance(error, InvalidRequest):
        error.param = param
    return error


_BY_GRPC_CODE: dict[str, type[AfdError]] = {
    kind.grpc_code: kind
    for kind in (
        InvalidRequest,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        Cancelled,
        Overloaded,
        PeerUnavailable,
        DeadlineExceeded,
        Mismatch,
        InternalError,
    )
}
