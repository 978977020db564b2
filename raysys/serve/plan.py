"""Which releases are live, and which of them answers a request."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from raysys.errors import UserError, nearest


class Plan:
    """releases: folders by version. traffic: shares by version, which sum to 1. shadow: a version that also gets every request.

    A user stays with a version as long as the shares stay, and with a growing share only joins it: the hash of the user is
    a point of [0, 1), and the versions take stretches of it in the order of their names.
    """

    def __init__(self, releases: Mapping[str, str], traffic: Mapping[str, float], shadow: str | None = None) -> None:
        for version in [*traffic, *([shadow] if shadow else [])]:
            if version not in releases:
                raise UserError(f"version {version!r} is not among the releases", nearest(version, releases))
        if not traffic or min(traffic.values()) < 0 or not math.isclose(sum(traffic.values()), 1.0, abs_tol=1e-9):
            raise UserError(f"traffic is {dict(traffic)}", "shares of 0 or more that sum to 1 are expected")
        self.releases, self.shadow = dict(releases), shadow
        self.traffic = {version: float(traffic[version]) for version in sorted(traffic)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Plan:
        """From plain data with the keys `releases`, `traffic` and `shadow`; `previous`, the plan before, is not read."""
        unknown = set(config) - {"releases", "traffic", "shadow", "previous"}
        if unknown:
            raise UserError(f"unknown key {sorted(unknown)[0]!r}", "releases, traffic and shadow are known")
        return cls(config.get("releases", {}), config.get("traffic", {}), config.get("shadow"))

    def assign(self, user: int | str) -> str:
        """The version that answers this user."""
        point = point_of(user)
        for version, share in self.traffic.items():
            point -= share
            if point < 0 and share > 0:
                return version
        return max(self.traffic, key=lambda name: self.traffic[name])  # shares that sum to a rounding less than 1


def point_of(user: int | str, purpose: str = "") -> float:
    """A point of [0, 1) that a user keeps, spread evenly over users and independent between purposes."""
    digest = hashlib.blake2b(f"{purpose}{type(user).__name__}:{user}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
