"""Numbers as people read them."""

from __future__ import annotations

import math

from secateur.core.ratios import times

#: One weight of 10^12 is told from none.
_MOST_DIGITS = 12


def percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent; never rounded to 0 or 100 unless it is.

    Example:
        >>> percent(0.912), percent(0.99999), percent(None)
        ('91.2 %', '99.999 %', '-')
    """
    if share is None:
        return "-"
    for more in range(digits, _MOST_DIGITS):
        text = f"{100 * share:.{more}f}"
        if (float(text) in (0, 100)) == (share in (0, 1)):
            return f"{text} %"
    return f"{100 * share:.{digits}f} %"


def count(number: float | None) -> str:
    """A count with three or four digits and k, M, G or T.

    Example:
        >>> count(322), count(13_020_000), count(2_560)
        ('322', '13.0 M', '2.56 k')
    """
    return "-" if number is None else _scaled(number, ("", "k", "M", "G", "T"))


def size(bytes_: float | None) -> str:
    """Bytes in powers of ten, as file managers show them.

    Example:
        >>> size(1_192_568), size(512)
        ('1.19 MB', '512 B')
    """
    return "-" if bytes_ is None else _scaled(bytes_, ("B", "kB", "MB", "GB", "TB"))


def milliseconds(value: float) -> str:
    """A time with three digits.

    Example:
        >>> milliseconds(4.32), milliseconds(0.0571), milliseconds(1234.0)
        ('4.32 ms', '0.0571 ms', '1234 ms')
    """
    return f"{_digits(value)} ms"


def fewer(before: float | None, after: float | None) -> str:
    """How many times less the second is.

    Example:
        >>> fewer(100, 12.5), fewer(10, 20), fewer(3, 3)
        ('8.0x less', '2.0x more', 'same')
    """
    if not before or not after:
        return ""
    return times(before / after, "less", "more")


def points(difference: float, error: float | None) -> str:
    """A difference of two shares, with its standard error.

    Example:
        >>> points(-0.0042, 0.0011), points(0.01, None)
        ('-0.42 ± 0.11 points', '+1.00 points')
    """
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return f"{100 * difference:+.2f}{spread} points"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(number) >= 999.5 and step + 1 < len(units):
        number, step = number / 1000, step + 1
    text = f"{number:.0f}" if step == 0 else _digits(number)
    return f"{text} {units[step]}".rstrip()


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # The digits are those of the rounded number: 0.9996 becomes 1.00.
    rounded = float(f"{value:.3g}")
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
