"""One JSON document per command, with keys that stay.

Every document has ``secateur`` (version of the package), ``schema`` (1), ``command``, and ``ok``.

* ``ok`` true: the keys of the command, e.g. ``measurement`` or ``comparison``. Shares are 0 to 1,
  sizes bytes, times milliseconds (``seconds`` where the key says so); what was not measured is
  ``null``.
* ``ok`` false: ``error`` with ``type``, ``asked``, ``found``, ``why``, ``do`` and ``exit_code``.

Keys of each command:

* ``inspect``: ``slots`` and ``totals``; with ``--structure`` ``widths``, ``parameters`` and
  ``removable``; with ``--criteria`` and the like, a list of that name.
* ``prune``: ``output``, ``recipe``, ``fingerprint``, ``sparsity``, ``layers``, ``comparison``, ``notes``,
  ``history``, ``seconds``, ``environment`` and ``onnx``.
* ``shrink``: the same with ``widths``, ``proof``, ``target``, ``parameters`` and ``pretrained`` in the
  place of ``sparsity`` and ``layers``.
* ``evaluate``: ``measurement`` and ``environment``. ``compare``: ``comparison``, ``masks`` (null, or
  their Jaccard index and its level by chance), ``environment``, ``required`` and ``missing``.
  ``export``: ``onnx``.
* ``ticket``: ``folder``, ``dense``, ``levels``, ``metric``, ``split``, ``structure`` and others; with
  ``--connectivity``, ``connectivity`` (of each level with the one before: ``shares``, ``errors``,
  ``losses`` and ``barrier``).
  ``plot``: ``output``, ``plots`` and ``left_out``.
* ``compile`` and ``bench``: those of ``secateur.report.runtime``. ``doctor``: those of
  ``secateur.report.doctor``.

``measurement`` has ``accuracy``, ``metric``, ``loss``, ``perplexity`` (of causal language models),
``samples``, ``one_class``, ``split``, ``parameters``, ``nonzeros``, ``sparsity``, ``pruned_sparsity``,
``macs_dense``, ``macs``, ``bytes``, ``uncounted`` and ``latency`` (``median``, ``p10``, ``p90``,
``batch``, ``threads``, ``repetitions``).

``comparison`` has ``a``, ``b`` (measurements), ``identical``, ``difference``, ``difference_error``,
``agreement``, ``kl``, ``size_ratio``, ``speed`` (``ratio``, ``low``, ``high``, ``verdict``) and
``verdict``, a list of ``name``, ``real`` and ``text``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from secateur.core.errors import SecateurError
from secateur.evaluate import Comparison, Measurement

SCHEMA = 1


def document(version: str, command: str, content: Mapping[str, Any]) -> str:
    """The document of a command that did what it was asked.

    Example:
        >>> print(document("0.1.0", "export", {"bytes": 12}))
        {
          "secateur": "0.1.0",
          "schema": 1,
          "command": "export",
          "ok": true,
          "bytes": 12
        }
    """
    return _text(version, command, True, content)


def error_document(version: str, command: str, error: BaseException, exit_code: int) -> str:
    """The document of a command that failed.

    Example:
        >>> from secateur.core.errors import UsageError
        >>> text = error_document("0.1.0", "prune", UsageError("a", "b", "c", "d"), 2)
        >>> json.loads(text)["error"]["found"]
        'b'
    """
    parts = error.parts() if isinstance(error, SecateurError) else _parts(command, error)
    content = {"type": type(error).__name__, **parts, "exit_code": exit_code}
    return _text(version, command, False, {"error": content})


def _parts(command: str, error: BaseException) -> dict[str, str]:
    """The four parts of an error that was not raised on purpose."""
    asked = f"secateur {command}"
    if isinstance(error, KeyboardInterrupt):
        why, do = "nothing half-written was left", "run the same command again"
        return {"asked": asked, "found": "it was interrupted (Ctrl-C)", "why": why, "do": do}
    why = "this is a defect of secateur, or of code that it called"
    do = "run it again with SECATEUR_DEBUG=1, which shows where"
    return {"asked": asked, "found": str(error) or type(error).__name__, "why": why, "do": do}


def measurement_json(found: Measurement) -> dict[str, Any]:
    """A measurement as plain data."""
    flat = dataclasses.asdict(found)
    cost = flat.pop("cost")
    return {**flat, **cost, "sparsity": found.cost.sparsity}


def comparison_json(found: Comparison) -> dict[str, Any]:
    """A comparison as plain data."""
    plain = dataclasses.asdict(found)
    plain["a"], plain["b"] = measurement_json(found.a), measurement_json(found.b)
    plain["size_ratio"] = found.size_ratio
    if found.speed is not None:
        plain["speed"]["verdict"] = found.speed.verdict
    return plain


def _text(version: str, command: str, ok: bool, content: Mapping[str, Any]) -> str:
    head = {"secateur": version, "schema": SCHEMA, "command": command, "ok": ok}
    return json.dumps(plain({**head, **content}), indent=2, allow_nan=False)


def plain(value: Any) -> Any:
    """Values that JSON has: infinities and NaN become null, tuples lists, all else text.

    Example:
        >>> plain({"a": (1, float("nan")), "b": 2.5})
        {'a': [1, None], 'b': 2.5}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)
