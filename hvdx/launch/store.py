"""What the ranks of a job tell each other while they connect: a bounded key-value store.

Horovod's C++ client writes each rank's socket addresses under ``scope/<rank>``, reads those of
the others, and, once all are connected, sends one DELETE per rank. These DELETEs arrive *after*
a barrier but in any order, while the fastest rank may already write its addresses for the next
round (a second core in the process, or ``init`` after ``shutdown``). Two obvious rules fail:

- delete nothing: the next round reads stale addresses and connects to closed ports;
- delete on every DELETE, or on the last: a fast rank's new addresses are wiped by a slow
  rank's old DELETE, and the others wait for them until they time out.

So the first DELETE of a round empties the scope, and the others of that round only count.
"""

from __future__ import annotations

import re

SCOPE = re.compile(r"[A-Za-z0-9_.@-]{1,320}")
KEY = re.compile(r"[A-Za-z0-9_.:-]{1,272}")  # those of elastic jobs: <host>:<local rank>
MAX_KEYS = 1 << 16
MAX_BYTES = 1 << 26


class Refused(Exception):
    """A request that the store does not carry out."""


class Store:
    """Values by scope and key, for a job of ``size`` ranks."""

    def __init__(self, size: int) -> None:
        # Measured: Gloo sends 136 bytes per peer and host names of at most 256 bytes.
        self.max_value = 1024 + 256 * size
        self._scopes: dict[str, dict[str, bytes]] = {}
        self._owed: dict[str, int] = {}  # DELETEs of a finished round that are still to come
        self._keys = 0
        self._bytes = 0

    def get(self, scope: str, key: str) -> bytes | None:
        """Return the value, or None while there is none."""
        return self._scopes.get(scope, {}).get(key)

    def put(self, scope: str, key: str, value: bytes) -> None:
        """Set a value; :class:`Refused` if a name is odd or a bound is reached."""
        if not (SCOPE.fullmatch(scope) and KEY.fullmatch(key)):
            raise Refused("odd scope or key")
        old = self.get(scope, key)
        keys = self._keys + (old is None)
        size = self._bytes + len(value) - len(old or b"")
        if len(value) > self.max_value or keys > MAX_KEYS or size > MAX_BYTES:
            raise Refused("too large")
        self._scopes.setdefault(scope, {})[key] = value
        self._keys, self._bytes = keys, size

    def delete(self, scope: str) -> None:
        """Take one rank's DELETE: the round's first empties the scope, the others only count."""
        if scope in self._owed:
            self._owed[scope] -= 1
            if self._owed[scope] == 0:
                del self._owed[scope]
            return
        values = self._scopes.pop(scope, {})
        self._keys -= len(values)
        self._bytes -= sum(map(len, values.values()))
        ranks = sum(key.isdecimal() for key in values)
        if ranks > 1:
            self._owed[scope] = ranks - 1
