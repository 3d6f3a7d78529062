"""When a request lags so far behind others of its size that it is worth sending a second time."""

from collections import deque

REMEMBERED = 256  # latest replies that count as "recent"
ENOUGH = 20  # replies of comparable size before anything is known
LAG = 1.5  # times the median: below that a request is not late, however regular the others are
QUANTILE = 0.95
MOST_SAVED = 8.0  # second requests that may be saved up: a stalled server must not meet a flood


class Hedges:
    """Latencies of recent replies, and an allowance of second requests.

    The allowance grows by `share` a request and a second request costs 1 of it, so that at no time more
    than `share` of all requests were sent twice.
    """

    def __init__(self, share: float):
        self._share = share
        self._allowance = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def sent(self) -> None:
        """Count a request that is not a second one."""
        self._allowance = min(self._allowance + self._share, MOST_SAVED)

    def answered(self, size: int, seconds: float) -> None:
        """Remember how long a request of `size` bytes took."""
        self._recent.append((size, seconds))

    def patience(self, size: int) -> float | None:
        """Seconds after which a request of `size` bytes lags; None where too little is known to say.

        Compared with replies to between half and twice as many bytes: log-probabilities of a text take
        about as long as the text is.
        """
        if not self._share:
            return None
        near = sorted(seconds for other, seconds in self._recent if size <= 2 * other <= 4 * size)
        if len(near) < ENOUGH:
            return None
        return max(LAG * near[len(near) // 2], near[int(QUANTILE * (len(near) - 1))])

    def take(self) -> bool:
        """Use up one second request, if one is allowed now."""
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True
