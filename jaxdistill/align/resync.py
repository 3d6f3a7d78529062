"""Finds the stretches on which two symbol streams agree, and step again after each mismatch.

A linear scan, not a minimal diff: the streams nearly always agree, and a response may be long.

Letters: N, M symbols of either stream, G segments, K window keys.
"""

import numpy as np
from jaxtyping import Int64, UInt16, UInt64

Symbols = UInt16[np.ndarray, " _"]

# (window, agreeing symbols that count as being in step): the nearer the place, the less proof it needs.
_SEARCHES = ((32, 4), (128, 8), (512, 16))
_PROOF = 16  # symbols, in all windows after those
_GROWTH = 4


def common_prefix(a: UInt16[np.ndarray, " N"], b: UInt16[np.ndarray, " M"]) -> int:
    """Number of leading symbols on which the streams agree. Time is linear in that number."""
    limit = min(len(a), len(b))
    done, block = 0, 256
    while done < limit:
        # Blocks grow, so that a short agreement in a long response costs little.
        stop = min(done + block, limit)
        differ = a[done:stop] != b[done:stop]
        first = int(differ.argmax())
        if differ[first]:
            return done + first
        done, block = stop, block * 4
    return limit


def agreeing_segments(
    a: UInt16[np.ndarray, " N"], b: UInt16[np.ndarray, " M"]
) -> tuple[Int64[np.ndarray, " G"], Int64[np.ndarray, " G"], Int64[np.ndarray, " G"]]:
    """Stretches with `a[i : i + n] == b[j : j + n]`, rising in both streams, as arrays (i, j, n).

    Every pair is compared symbol by symbol; where the streams differ, the next stretch begins where they
    find step with the fewest symbols skipped. Linear in N + M: a window grows only after the smaller one
    held no agreement, so its cost is paid for by what is then skipped.
    """
    prefix = common_prefix(a, b)
    found = [(0, 0, prefix)] if prefix else []
    tail = common_prefix(a[prefix:][::-1], b[prefix:][::-1])
    end_a, end_b = len(a) - tail, len(b) - tail
    i = j = prefix
    while i < end_a and j < end_b:
        step = _find_step(a[i:end_a], b[j:end_b])
        if step is None:
            break
        i, j = i + step[0], j + step[1]
        length = common_prefix(a[i:end_a], b[j:end_b])
        found.append((i, j, length))
        i, j = i + length, j + length
    if tail:
        found.append((end_a, end_b, tail))
    table = np.asarray(found, np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _find_step(a: UInt16[np.ndarray, " N"], b: UInt16[np.ndarray, " M"]) -> tuple[int, int] | None:
    """Symbols to skip on each side until the streams agree again, or None when they never do."""
    longest = max(len(a), len(b))
    searches = list(_SEARCHES)
    while searches[-1][0] < longest:
        searches.append((searches[-1][0] * _GROWTH, _PROOF))
    for window, proof in searches:
        step = _nearest_agreement(a[:window], b[:window], proof)
        if step is not None:
            return step
        if window >= longest:
            break
    return None


def _nearest_agreement(
    a: UInt16[np.ndarray, " N"], b: UInt16[np.ndarray, " M"], proof: int
) -> tuple[int, int] | None:
    """The places (i, j) with the least i + j from which `proof` symbols agree, or None."""
    if min(len(a), len(b)) < proof:
        return None
    keys_a, keys_b = _window_keys(a, proof), _window_keys(b, proof)
    order = np.argsort(keys_b, kind="stable")  # stable: the first of equal keys is the nearest place
    at = np.minimum(np.searchsorted(keys_b, keys_a, sorter=order), len(order) - 1)
    j = order[at]
    i = np.flatnonzero(keys_b[j] == keys_a)
    if not len(i):
        return None
    j = j[i]
    # Fewest symbols skipped; of these the pair that skips most evenly, as a replaced symbol does.
    best = int(np.argmin((i + j) * (len(a) + len(b)) + np.abs(i - j)))
    place = int(i[best]), int(j[best])
    # Keys longer than 7 symbols are hashes: believe the symbols.
    agrees = np.array_equal(a[place[0] : place[0] + proof], b[place[1] : place[1] + proof])
    return place if agrees else None


def _window_keys(symbols: UInt16[np.ndarray, " N"], width: int) -> UInt64[np.ndarray, " K"]:
    """One 64-bit key for each run of `width` symbols (polynomial, modulo 2^64)."""
    count = len(symbols) - width + 1
    keys = np.zeros(count, np.uint64)
    base = np.uint64(0x9E3779B97F4A7C15)
    for offset in range(width):
        keys = keys * base + symbols[offset : offset + count]
    return keys
