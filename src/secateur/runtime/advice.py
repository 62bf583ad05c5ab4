"""What the facts about a machine mean for someone who prunes, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.runtime.breakeven import BreakEven, crossing
from secateur.runtime.machine import Machine

# Dense bfloat16 that is less than this many times faster is no reason to change anything.
_CLEARLY = 1.3
# Times the dense time below which a layer of 2:4 is more than a tie.
_PAYS = 0.97
# From this share of the processors on, other work takes threads away from the measurement.
_BUSY = 0.4


def advice(machine: Machine, measured: Sequence[BreakEven]) -> tuple[str, ...]:
    """Plain sentences, the most important first.

    Args:
        machine: As measured.
        measured: Break-evens; may be empty.
    """
    if not machine.kernels:
        return (f"There are no sparse kernels here. {machine.problem}",)
    said = [
        _busy(machine),
        _wrong_isa(machine),
        *_patterns(measured),
        _token(measured),
        _bfloat16(machine, measured),
    ]
    return tuple(sentence for sentence in said if sentence)


def _busy(machine: Machine) -> str:
    if machine.load <= _BUSY * machine.cores:
        return ""
    return (
        f"The machine was busy in the minute before (load {machine.load:.1f} on {machine.cores} "
        "processors). If other work went on, the figures are about what it left: measure again."
    )


def _wrong_isa(machine: Machine) -> str:
    if machine.isa is None:
        return machine.problem
    if machine.isa != machine.kernels[0]:
        return (
            f"SECATEUR_ISA holds the kernels to {machine.isa}; this machine has "
            f"{machine.kernels[0]}. Unset it for speed."
        )
    return ""


def _many(measured: Sequence[BreakEven]) -> list[BreakEven]:
    """Layers with many positions: all but those of one token."""
    return [b for b in measured if "1 token" not in b.layer]


def _patterns(measured: Sequence[BreakEven]) -> list[str]:
    sentences = []
    many = _many(measured)
    for pattern in dict.fromkeys(b.pattern for b in many):
        rows = [b for b in many if b.pattern == pattern]
        if pattern == "2:4":
            sentences.append(_two_of_four([p.ratio for b in rows for p in b.points]))
            continue
        where = [b.sparsity for b in rows if b.sparsity is not None]
        if len(where) < len(rows):
            sentences.append(
                f"{_named(pattern)} was not faster than dense in {len(rows) - len(where)} of "
                f"{len(rows)} layers, whatever the sparsity."
            )
        else:
            start = _start(max(where), all(b.at_most for b in rows))
            sentences.append(f"{_named(pattern)} pays {start}, in all layers measured.")
    return sentences


def _two_of_four(ratios: Sequence[float]) -> str:
    speeds = [f"{1 / ratio:.2f}" for ratio in sorted(ratios, reverse=True)]
    span = f"{' to '.join(dict.fromkeys((speeds[0], speeds[-1])))} times the dense speed at 50 %."
    count = sum(ratio < _PAYS for ratio in ratios)
    if not count:
        return f"2:4 does not pay on this processor: {span}"
    where = "all" if count == len(ratios) else f"{count} of {len(ratios)}"
    return f"2:4 pays on this processor in {where} layers measured: {span}"


def _named(pattern: str) -> str:
    return "Unstructured sparsity" if pattern == "unstructured" else f"Sparsity in {pattern}"


def _token(measured: Sequence[BreakEven]) -> str:
    rows = [b for b in measured if "1 token" in b.layer and b.sparsity is not None]
    if not rows:
        return ""
    types: dict[str, list[str]] = {}
    for b in rows:
        if b.sparsity is not None:
            types.setdefault(_start(b.sparsity, b.at_most), []).append(b.dtype)
    parts = [f"{start} in {' and '.join(names)}" for start, names in types.items()]
    return f"For one token at a time (a language model that writes) it pays {', '.join(parts)}."


def _start(sparsity: float, at_most: bool) -> str:
    return f"at {_percent(sparsity)} already" if at_most else f"from {_percent(sparsity)} on"


def _bfloat16(machine: Machine, measured: Sequence[BreakEven]) -> str:
    ratio = machine.bfloat16_gflops / machine.float32_gflops
    unit = "it has a matrix unit (AMX)" if machine.amx else "it has no matrix unit (AMX)"
    if ratio < _CLEARLY:
        return f"Dense bfloat16 is no rival here: {ratio:.2g} times the rate of float32; {unit}."
    rows = [b for b in _many(measured) if b.pattern == "unstructured"]
    needed = [crossing([(p.sparsity, p.ratio) for p in b.points], 1 / ratio)[0] for b in rows]
    reached = [n for n in needed if n is not None]
    start = f"Dense bfloat16 runs at {ratio:.2g} times the rate of float32 here; {unit}."
    if not rows:
        return start
    if len(reached) < len(rows):
        return (
            f"{start} Unstructured float32 does not catch up in all layers: if bfloat16 is accurate "
            "enough for you, run the dense network in it, or prune channels and heads."
        )
    return f"{start} Unstructured float32 overtakes it from about {_percent(max(reached))} on."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
