"""A table from 64-bit keys to 63-bit numbers that is read and filled a whole array at a time.

Open addressing with linear probing, at most half full: a look-up costs the same however much is remembered.

Letters: N keys of one call.
"""

import numpy as np
from jaxtyping import Int64

_EMPTY = -1
_FIRST_BITS = 12
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, TAOCP 3, 6.4)


class Memory:
    """Remembers a value of 0..2^63 - 1 for each key of 0..2^63 - 1. About 32 to 64 bytes a key."""

    def __init__(self) -> None:
        self._count = 0
        self._clear(_FIRST_BITS)

    def __len__(self) -> int:
        return self._count

    def _clear(self, bits: int) -> None:
        self._bits = bits
        self._keys = np.full(1 << bits, _EMPTY, np.int64)
        self._values = np.zeros(1 << bits, np.int64)

    def get(self, keys: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        """The value of each key, -1 where it is not known."""
        slots = self._home(keys)
        held = self._keys[slots]
        pending = np.flatnonzero((held != keys) & (held != _EMPTY))
        while len(pending):
            slots[pending] = (slots[pending] + 1) & (len(self._keys) - 1)
            held[pending] = others = self._keys[slots[pending]]
            pending = pending[(others != keys[pending]) & (others != _EMPTY)]
        return np.where(held == keys, self._values[slots], -1)

    def put(self, keys: Int64[np.ndarray, " N"], values: Int64[np.ndarray, " N"]) -> None:
        """Remembers keys that are new and differ from each other."""
        if 2 * (self._count + len(keys)) > len(self._keys):
            old = self._keys != _EMPTY
            old_keys, old_values = self._keys[old], self._values[old]
            self._clear((2 * (self._count + len(keys))).bit_length())
            self._insert(old_keys, old_values)
        self._insert(keys, values)
        self._count += len(keys)

    def _insert(self, keys: Int64[np.ndarray, " N"], values: Int64[np.ndarray, " N"]) -> None:
        slots = self._home(keys)
        pending = np.arange(len(keys))
        while len(pending):
            free = pending[self._keys[slots[pending]] == _EMPTY]
            self._keys[slots[free]] = keys[free]  # of several keys at one slot the last stays
            won = self._keys[slots[pending]] == keys[pending]
            self._values[slots[pending[won]]] = values[pending[won]]
            pending = pending[~won]
            slots[pending] = (slots[pending] + 1) & (len(self._keys) - 1)

    def _home(self, keys: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        return ((keys.astype(np.uint64) * _SPREAD) >> np.uint64(64 - self._bits)).astype(np.int64)
