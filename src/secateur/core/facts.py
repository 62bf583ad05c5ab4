"""Facts: what a run did, as plain data. Text, JSON and HTML are renderers of these."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Note:
    """Something that was skipped, pinned, damped or replaced, or that a user should know.

    Args:
        topic: One word a reader can search for, e.g. ``"damped"``, ``"left-out"``, ``"sensitive"``.
        where: The weight, layer or part concerned; ``""`` for the whole run.
        text: What happened and why.
    """

    topic: str
    where: str
    text: str


@dataclass(frozen=True)
class LayerFacts:
    """One pruned weight.

    Args:
        output_error: Relative squared output error ``||(W - W')X||² / ||WX||²`` on the
            calibration data, or ``None`` where no data was given. After an asymmetric repair against the
            dense network and its inputs.
        knee: The sparsity beyond which the output error of plain masking rises steeply.
        seconds: Time that its repair took.
    """

    name: str
    shape: tuple[int, ...]
    total: int
    kept: int
    output_error: float | None = None
    knee: float | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, name: str, mask: Tensor) -> LayerFacts:
        """What a mask leaves of a weight.

        Example:
            >>> LayerFacts.of("fc.weight", torch.tensor([[True, False]])).kept
            1
        """
        return cls(name, tuple(mask.shape), mask.numel(), int(mask.sum()))

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""
        return 1.0 - self.kept / self.total


@dataclass(frozen=True)
class WidthFacts:
    """One width of a network that was cut.

    Args:
        name: Of the width: the module that produces its units first.
        groups: How many groups there were.
        kept: How many are left.
        parameters: Everything that lost something.
        why: Why several units make one group, if they do.
    """

    name: str
    groups: int
    kept: int
    parameters: tuple[str, ...]
    why: str = ""


@dataclass
class Facts:
    """Everything that a run can say about itself.

    Example:
        >>> facts = Facts(layers=[LayerFacts("fc.weight", (2, 5), total=10, kept=4)])
        >>> facts.note("left-out", "head.weight", "the final classifier")
        >>> facts.sparsity, Facts.from_dict(facts.to_dict()) == facts
        (0.6, True)
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    layers: list[LayerFacts] = field(default_factory=list)
    widths: list[WidthFacts] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known: set[Note] = set()

    def note(self, topic: str, where: str, text: str) -> None:
        """Add a note once."""
        new = Note(topic, where, text)
        # Networks of thousands of layers have as many notes. The list is anyone's to change.
        if len(self._known) != len(self.notes):
            self._known = set(self.notes)
        if new not in self._known or new not in self.notes:
            self._known.add(new)
            self.notes.append(new)

    @property
    def sparsity(self) -> float:
        """Share of zeros over the pruned weights."""
        total = sum(layer.total for layer in self.layers)
        return 1.0 - sum(layer.kept for layer in self.layers) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Facts:
        """Inverse of :meth:`to_dict` after a trip through JSON."""
        layers = [
            LayerFacts(**{**layer, "shape": tuple(layer["shape"])})
            for layer in data.get("layers", [])
        ]
        widths = [
            WidthFacts(**{**width, "parameters": tuple(width["parameters"])})
            for width in data.get("widths", [])
        ]
        notes = [Note(**note) for note in data.get("notes", [])]
        rest = {k: v for k, v in data.items() if k not in ("layers", "widths", "notes")}
        return Facts(layers=layers, widths=widths, notes=notes, **rest)


def environment() -> dict[str, Any]:
    """The machine and versions behind a measurement; a GPU if this process has used one."""
    # To ask for its name would begin to use it, which takes some hundred megabytes of its memory.
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "machine": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if cuda else None,
    }


_CPUINFO = Path("/proc/cpuinfo")


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing on other systems.

    Example:
        >>> isinstance(cpuinfo(), dict)
        True
    """
    found: dict[str, str] = {}
    try:
        with _CPUINFO.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.strip():
                    break  # the next processor is one of the same
                key, _, value = line.partition(":")
                found[key.strip()] = value.strip()
    except OSError:
        pass
    return found


def processor() -> str:
    """The processor's name; family and model as well where a virtual machine hides which one it is.

    Example:
        >>> bool(processor())
        True
    """
    about = cpuinfo()
    name = about.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in about and not any(c.isdigit() for c in name):
        return f"{name} (family {about['cpu family']}, model {about.get('model', '?')})"
    return name
