"""Scorers that compare a response with the row's answer."""

import re
from fractions import Fraction

from jaxdistill.errors import DataError
from jaxdistill.records import Prompt

_SEPARATORS = ",\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}"  # between thousands
_SIGN = "[-+\N{MINUS SIGN}]"
# One number. A sign counts only where nothing to subtract from stands before it, and digits that follow a
# letter or a caret (m2, H2O, 10^3) are part of a name. No part can match in two ways, so that a long
# response takes linear time; exponents are short, since 1e999999999 would fill the memory.
_NUMBER = re.compile(
    rf"""
    (?:(?<![0-9A-Za-z_)\]])(?P<sign>{_SIGN})[$€£¥]?)?
    (?<![0-9A-Za-z_^])(?=\.?[0-9])
    (?:
        (?P<top>[0-9]+)/(?P<bottom>[0-9]++)(?!\.[0-9])
      | (?P<whole>[0-9]{{1,3}}(?:[{_SEPARATORS}][0-9]{{3}}(?![0-9]))+|[0-9]+)?
        (?P<decimals>\.[0-9]+)?
        (?:[eE](?P<exponent>{_SIGN}?[0-9]{{1,3}})(?![0-9]))?
    )
    """,
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_LONGEST = 1_000  # digits of a number that is compared; Python refuses to read much longer ones


def exact(response: str, prompt: Prompt) -> bool:
    """Whether the response is the answer, white space around either aside."""
    return response.strip() == _answer(prompt)


def final_line(response: str, prompt: Prompt) -> bool:
    """Whether the response's last line is the answer, white space around either aside."""
    return response.strip().rpartition("\n")[2].strip() == _answer(prompt)


def numeric(response: str, prompt: Prompt) -> bool:
    """Whether the last number of the response equals the last number of the answer, exactly.

    A number is made of digits, with thousands set apart by commas or no-break spaces, decimals after a point,
    an exponent (`1.5e3`), or a fraction (`3/4`, `\\frac{3}{4}`). A minus belongs to it where nothing to
    subtract from stands before it. What follows is not read: a unit, a percent sign, a period. So
    `$1,234.50`, `1234.5 m2` and `2469/2` are equal, `50 %` is 50, and `1,5` is two numbers. A fraction by
    zero, and a number of more than 1,000 digits, equals nothing.
    """
    found = last_number(response)
    return found is not None and found == last_number(_answer(prompt))


def has_number(prompt: Prompt) -> bool:
    """Whether the row has an answer; raises `DataError` for one without a number."""
    if prompt.answer is None:
        return False
    if last_number(prompt.answer) is None:
        raise DataError(
            f"{prompt.where}: the answer {prompt.answer!r:.80} holds no number for "
            "scorer 'numeric'; write one, or use another scorer"
        )
    return True


def last_number(text: str) -> Fraction | None:
    """The last number of a text by the rule of `numeric`; None without one."""
    matches = list(_NUMBER.finditer(_LATEX_FRACTION.sub(r"\1/\2", text)))
    if not matches or len(matches[-1].group()) > _LONGEST:
        return None
    part = matches[-1].groupdict()
    sign = 1 if part["sign"] in (None, "+") else -1
    if part["top"]:
        return sign * Fraction(int(part["top"]), int(part["bottom"])) if int(part["bottom"]) else None
    whole = re.sub("[^0-9]", "", part["whole"] or "0")
    exponent = int((part["exponent"] or "0").replace("\N{MINUS SIGN}", "-"))
    return sign * Fraction(whole + (part["decimals"] or "")) * Fraction(10) ** exponent


def _answer(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise DataError(f"{prompt.where} has no answer to compare with")
    return prompt.answer.strip()
