"""Every error that secateur raises on purpose.

::

    SecateurError
    ├── UsageError (ValueError)        what was asked cannot be done as asked        exit 2
    │   ├── UnknownName                a name that is in no catalogue
    │   ├── SelectorError              a selector that matches nothing
    │   ├── FoldError                  a pattern cannot fold a shape
    │   ├── BudgetError                a target outside what can be reached
    │   └── NeedsData                  a method that needs data was given none
    ├── DataError (ValueError)         weights, activations or data are unusable     exit 3
    │   └── NonFinite                  NaN or infinity, named
    ├── FileError (OSError)            a file is missing, damaged or in the way      exit 4
    │   ├── FormatError                truncated, altered or oversized
    │   └── OutputExists               the output folder is already there
    ├── MissingExtra (ImportError)     an optional dependency is not installed       exit 5
    ├── MissingNative (ImportError)    the native library is missing or unusable     exit 5
    └── NotYet (NotImplementedError)   planned, not built                            exit 5

Each message has four parts: what was asked, what was found, why it cannot be, what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class SecateurError(Exception):
    """The root: an error in four parts.

    Args:
        asked: What the caller wanted, as a clause without a full stop.
        found: What is there instead, with numbers.
        why: Why the two do not fit.
        do: What to change.

    Example:
        >>> print(UsageError("sparsity=90", "90 is not in [0, 1)", "sparsity is a fraction",
        ...                  "write 0.9 or '90%'"))
        sparsity=90: 90 is not in [0, 1). Sparsity is a fraction. Write 0.9 or '90%'.
    """

    exit_code = 1

    def __init__(self, asked: str, found: str, why: str = "", do: str = "") -> None:
        self.asked, self.found, self.why, self.do = asked, found, why, do
        super().__init__(str(self))

    def __str__(self) -> str:
        tail = " ".join(_sentence(part) for part in (self.why, self.do) if part)
        return f"{self.asked}: {self.found.rstrip('.')}. {tail}".rstrip()

    def __reduce__(self) -> tuple[Any, ...]:
        # An error of a worker process reaches the parent pickled. Exceptions are rebuilt from their
        # message by default, and subclasses take other arguments than the four parts.
        return _revived, (type(self), self.asked, self.found, self.why, self.do)

    def parts(self) -> dict[str, str]:
        """The four parts by name, for renderers."""
        return {"asked": self.asked, "found": self.found, "why": self.why, "do": self.do}


class UsageError(SecateurError, ValueError):
    """What was asked cannot be done as asked."""

    exit_code = 2


class UnknownName(UsageError):
    """A name that is in no catalogue; the message suggests the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        hint = hint or ("write one of these" if names else "leave it out")
        super().__init__(
            f"{kind} {name!r}",
            f"there is no {kind} of that name",
            f"the known ones are {', '.join(names)}",
            hint,
        )


class SelectorError(UsageError):
    """A selector that matches nothing."""


class FoldError(UsageError):
    """A pattern cannot fold a weight of this shape."""


class BudgetError(UsageError):
    """A target outside what the network can reach."""


class NeedsData(UsageError):
    """A method that needs data, a loss or an optimizer was given none."""


class DataError(SecateurError, ValueError):
    """Weights, activations or data are unusable."""

    exit_code = 3


class NonFinite(DataError):
    """NaN or infinity where a finite number is needed; the place is named."""


class FileError(SecateurError, OSError):
    """A file is missing, damaged or in the way."""

    exit_code = 4


class FormatError(FileError):
    """A file is truncated, altered, oversized or of another version."""


class OutputExists(FileError):
    """The output is already there and would be overwritten."""


class MissingExtra(SecateurError, ImportError):
    """An optional dependency is not installed; the message names the extra."""

    exit_code = 5

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            purpose,
            f"the package {package!r} is not installed",
            f"it belongs to the optional extra {extra!r}",
            f"run: pip install 'secateur[{extra}]'",
        )


class MissingNative(SecateurError, ImportError):
    """The native library was not built, or this machine cannot load it.

    Args:
        found: What is there instead of a library that works.

    Example:
        >>> MissingNative("it was not built").exit_code
        5
    """

    exit_code = 5

    def __init__(self, found: str) -> None:
        super().__init__(
            "the sparse runtime",
            found,
            "its kernels are a native library, built when secateur is installed with a C++17 compiler",
            "install a compiler (Debian: apt install g++), then secateur again, with pip's options "
            "--force-reinstall --no-deps --no-cache-dir (in a checkout: make native)",
        )


class NotYet(SecateurError, NotImplementedError):
    """Planned, not built."""

    exit_code = 5


def with_article(noun: str) -> str:
    """A noun with ``a`` or ``an`` before it, as it is spoken.

    Example:
        >>> with_article("int"), with_article("str"), with_article("UNet"), with_article("uint8")
        ('an int', 'a str', 'a UNet', 'a uint8')
    """
    spoken_as_you = re.match(r"u(int|n[ei]|s)", noun, re.IGNORECASE)
    return f"{'an' if noun[:1] in 'aeiouAEIOU' and not spoken_as_you else 'a'} {noun}"


def kind_of(value: object) -> str:
    """The type of a value, with its article.

    Example:
        >>> kind_of(3), kind_of([])
        ('an int', 'a list')
    """
    return with_article(type(value).__name__)


def first_line(error: Exception, most: int = 300) -> str:
    r"""What an exception says, in one line.

    Example:
        >>> first_line(ValueError("no good\nat all"))
        'ValueError: no good'
    """
    told = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {told[:most]}"


def _revived(kind: type[SecateurError], *parts: str) -> SecateurError:
    error = kind.__new__(kind)
    SecateurError.__init__(error, *parts)
    return error


def _sentence(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text[-1:] in ".?!" else text + "."
