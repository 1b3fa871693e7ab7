"""The chaos program's order of faults, its records, and its table; tests/serve/test_failures.py runs its rounds."""

from __future__ import annotations

from collections import Counter

from benchmarks.chaos.faults import FAULTS, schedule
from benchmarks.chaos.rounds import Round, _keep, _kept, table


def test_every_fault_comes_equally_often_in_an_order_that_the_seed_names():
    rounds = schedule(seed=1, num_rounds=3 * len(FAULTS))
    assert set(Counter(rounds).values()) == {3}
    assert rounds == schedule(1, 3 * len(FAULTS))
    assert rounds[: len(FAULTS)] != schedule(2, len(FAULTS))


def test_a_run_goes_on_where_it_stopped_unless_the_seed_is_another(tmp_path):
    path = tmp_path / "chaos.json"
    assert _kept(path, seed=1) == []
    rounds = [Round("SIGKILL, rank 0", seconds_to_end=1.0, num_texts=8, notes=["a note"])]
    _keep(path, 1, rounds)
    assert _kept(path, seed=1) == rounds
    assert _kept(path, seed=2) == []


def test_the_table_has_a_line_per_fault_and_hides_nothing():
    rounds = [
        Round("raise, rank 1", seconds_to_end=1.0, seconds_to_healthy=9.0, num_texts=8),
        Round("raise, rank 1", seconds_to_end=3.0, seconds_to_healthy=None, num_texts=8, num_changed=1, num_lost=2),
    ]
    assert table(rounds).splitlines()[2:] == [
        "| raise, rank 1 | 2 | 2.0 s, 3.0 s | 9.0 s, 9.0 s, 1 never | 16 | 1 | 2 |"
    ]
