"""The race against a clock of ours: whose turn it is, which runs count, and who is left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from secateur.runtime.race import race


@dataclass
class Track:
    """Runners that only move the clock: the first run after another one's takes longer."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def runner(self, name: str, milliseconds: float, *, cold: float = 0.0) -> Callable[[], None]:
        def run() -> None:
            first = self.log[-1:] != [name]
            self.now += (milliseconds + cold * first) / 1000
            self.log.append(name)

        return run


@pytest.fixture
def track(monkeypatch: pytest.MonkeyPatch) -> Track:
    made = Track()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


def laps(log: list[str]) -> list[tuple[str, int]]:
    """Who ran how many times in a row."""
    found: list[tuple[str, int]] = []
    for name in log:
        if found and found[-1][0] == name:
            found[-1] = name, found[-1][1] + 1
        else:
            found.append((name, 1))
    return found


def test_runs_alternate_and_each_counts(track: Track) -> None:
    a, b = track.runner("a", 4.0, cold=4.0), track.runner("b", 1.0, cold=1.0)
    raced = race([a, b], seconds=0.0, most=3, drop=False)
    # Two warm-up rounds, then a, b, b, a, a, b.
    assert "".join(track.log) == "abab" + "abbaab"
    assert raced.times == (pytest.approx((8.0, 8.0, 4.0)), pytest.approx((2.0, 1.0, 2.0)))


def test_of_a_turn_the_first_run_does_not_count(track: Track) -> None:
    a, b = track.runner("a", 4.0, cold=9.0), track.runner("b", 1.0, cold=5.0)
    raced = race([a, b], seconds=0.0, drop=False, turn=0.07)
    # The slower one's last warm-up took 13 ms, so a turn is five runs that count.
    assert laps(track.log)[4:] == [("a", 6), ("b", 12), ("a", 12), ("b", 6)]
    assert raced.times == (pytest.approx((4.0,) * 3), pytest.approx((1.0,) * 3))
    assert raced.ratio(1) == pytest.approx(0.25)


def test_a_turn_of_a_fast_runner_ends_and_a_slow_one_runs_once(track: Track) -> None:
    fast, slow = track.runner("f", 0.01), track.runner("s", 90.0, cold=5.0)
    race([fast], seconds=0.0, most=1, turn=1.0)
    assert laps(track.log) == [("f", 2 + 1 + 8)]
    track.log.clear()
    raced = race([slow, fast], seconds=0.0, most=2, turn=0.1)
    assert laps(track.log)[4:] == [("s", 1), ("f", 2), ("s", 1)]
    assert raced.times[0] == pytest.approx((95.0, 95.0))


def test_the_hopeless_are_left_out_and_the_first_never(track: Track) -> None:
    first, hopeless, best = (track.runner(n, t) for n, t in zip("abc", (90, 80, 10), strict=True))
    raced = race([first, hopeless, best], seconds=0.0, most=10)
    assert [len(times) for times in raced.times] == [3, 1, 3]
    assert [raced.finished(i) for i in range(3)] == [True, False, True]
    assert len(race([first, hopeless, best], seconds=0.0, most=10, drop=False).times[1]) == 3


def test_a_race_lasts_as_long_as_it_was_told(track: Track) -> None:
    run = track.runner("a", 10.0)
    assert len(race([run], seconds=0.295, drop=False).times[0]) == 30
    assert len(race([run], seconds=0.02, drop=False).times[0]) == 5
    assert len(race([run], seconds=0.009, drop=False).times[0]) == 3
    assert len(race([run], seconds=60.0, most=7, drop=False).times[0]) == 7
