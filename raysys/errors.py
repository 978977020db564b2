"""Errors that a user can cause: one line that says what is wrong, and a hint that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. Jobs print `message` and `hint` on one line each, without a traceback."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  hint: {hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str | None]]:
        # Exceptions cross process borders (Ray workers) by pickle, which would otherwise pass the joined text as the message.
        return type(self), (self.message, self.hint)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known name nearest to a wrong one, or all of them where none is near."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"


def check_count(key: str, value: int, least: int = 1) -> int:
    """A number of something, as it is; a smaller one than `least` is a `UserError` that names the key."""
    if value < least:
        raise UserError(f"{key} is {value}", f"at least {least} is expected")
    return value


def first_line(error: Exception) -> str:
    """What an error of another library says, for a message of one line."""
    return str(error).strip().splitlines()[0].rstrip(".")
