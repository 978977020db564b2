"""Why a request is not answered, apart from how HTTP says so."""

from __future__ import annotations


class BadRequest(ValueError):
    """The request is at fault; the message may be shown to the client."""


class Unavailable(RuntimeError):
    """The request may come again. retry_after_s: when."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    """A queue is full."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("too many requests are waiting", retry_after_s)
