"""Bytes that end inside a character of UTF-8, or in white space: what can stand behind them."""

# What may stand behind these first bytes of a character (Unicode 15, table 3-7); behind others 0x80 to 0xBF.
_SECOND_BYTES = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
ONE, OTHER = 0x8F, 0xBF  # two ways to complete one


def _missing(data: bytes) -> int:
    """How many bytes the character lacks that data end inside of, 0 where they do not."""
    for back, byte in enumerate(reversed(data[-3:]), start=1):
        if byte >= 0xC0:
            return max(2 + (byte >= 0xE0) + (byte >= 0xF0) - back, 0)
        if byte < 0x80:
            break
    return 0


def completed(data: bytes, fill: int) -> bytes:
    """Data with the character they end inside of made whole by `fill` (0x80..0xBF), or the next byte to it
    that UTF-8 allows."""
    missing = _missing(data)
    if not missing:
        return data
    low, high = _SECOND_BYTES.get(data[-1], (0x80, 0xBF))
    return data + bytes([min(max(fill, low), high)]) + bytes([fill]) * (missing - 1)


def going_otherwise(text: bytes, shortest: bytes, what: bytes) -> bytes:
    """The text going on with `what`. Where it ends inside a character, which is whole in `shortest`, the next
    byte is another than there: a token that holds that byte must not be the same by chance."""
    longer = completed(text + what, OTHER)
    at = len(text)
    return completed(text, OTHER) if longer[at : at + 1] == shortest[at : at + 1] != b"" else longer


def is_open(before: bytes) -> bool:
    """Whether bytes end in white space or inside a character."""
    return _missing(before) > 0 or ends_in_space(before)


def ends_in_space(data: bytes) -> bool:
    """Whether the last character is white space."""
    if data[-1:] < b"\x80":
        return data[-1:].decode().isspace()
    return data[-4:].decode("utf-8", "ignore")[-1:].isspace()
