"""The laws of schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from secateur.schedule import Schedule, due, events, share_at
from secateur.testing.law import require

_POINTS = 200


def check_schedule(
    schedule: Schedule, sparsities: Sequence[float] = (0.0, 0.3, 0.9, 0.999)
) -> None:
    """Check that a schedule keeps its laws.

    Share 0 at ``begin`` and before, 1 at ``end`` and after, inside [0, 1] between; monotone unless
    it says that it is cyclic; its events rise from begin to end and are due.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.schedule import Polynomial
        >>> check_schedule(Polynomial(begin=5, end=50, frequency=5))
    """
    begin, end = schedule.begin, schedule.end
    require(
        schedule.unit in ("steps", "epochs", "rounds"),
        "time is counted in steps, epochs or rounds",
        schedule,
        schedule.unit,
    )
    times = [begin + (end - begin) * k / _POINTS for k in range(_POINTS + 1)]
    for sparsity in sparsities:
        shares = [share_at(schedule, t, sparsity) for t in times]
        ok = all(isinstance(s, float) and -1e-12 <= s <= 1 + 1e-12 for s in shares)
        require(ok, "shares lie in [0, 1]", schedule, f"{shares[:3]} ... at sparsity {sparsity}")
        law = "the share is 1 from the end on"
        late = [share_at(schedule, end + more, sparsity) for more in (0, 1, 1000)]
        require(late == [1.0] * 3, law, schedule, f"{late} at sparsity {sparsity:g}")
        # Just before the end it is nearly there too, or the last update would be a jump. A schedule
        # without a length jumps on purpose.
        if end > begin:
            last = schedule.share(1.0, sparsity)
            require(math.isclose(last, 1.0), law, schedule, f"share(1.0) is {last:g}")
            first = schedule.share(0.0, sparsity)
            law = "the share is 0 at the beginning"
            require(math.isclose(first, 0.0, abs_tol=1e-12), law, schedule, f"it is {first:g}")
        early = share_at(schedule, begin - 1, sparsity)
        require(early == 0, "the share is 0 before the beginning", schedule, f"it is {early:g}")
        if not schedule.cyclic:
            drop = max((a - b for a, b in itertools.pairwise(shares)), default=0.0)
            law = "sparsity never falls, unless the schedule is cyclic"
            require(drop <= 1e-12, law, schedule, f"it falls by {drop:g} at sparsity {sparsity:g}")
    moments = events(schedule)
    rising = all(a < b for a, b in itertools.pairwise(moments))
    ends = math.isclose(moments[0], begin) and math.isclose(moments[-1], end)
    missed = [t for t in moments if not due(schedule, t)]
    law = "events rise from begin to end, and each is due"
    require(rising and ends and not missed, law, schedule, f"{moments[:5]}, not due: {missed[:5]}")
