"""The options become a plan; the plan is fair to every rung and keeps to its budget."""

import argparse
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from redirector.compare import run
from redirector.compare.cases import CASES, Rung, why_not
from redirector.compare.command import add_arguments, choose_cpu, make_plan
from redirector.compare.plan import Plan
from redirector.errors import InputError


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_every_rung_is_measured_in_every_round_and_place() -> None:
    plan = Plan(CASES, tuple(Rung), rounds=6, warmup=0.1, seconds=0.5)
    order = list(plan.order())
    assert len(order) == plan.cells() == len(set(order))
    expected = {(c.name, r) for c in CASES for r in Rung if why_not(c, r) is None}
    for number in range(1, 7):
        assert {(c.name, r) for n, c, r in order if n == number} == expected
    first = [next(r for n, c, r in order if (n, c) == (number, CASES[0])) for number in range(1, 7)]
    assert sorted(first) == sorted(Rung)


def test_rungs_of_a_case_follow_each_other() -> None:
    plan = Plan(CASES[:3], tuple(Rung), rounds=2, warmup=0.1, seconds=0.5)
    cases = [(number, case.name) for number, case, _ in plan.order()]
    assert list(dict.fromkeys(cases)) == sorted(set(cases), key=cases.index)
    assert set(Counter(cases).values()) == {len(Rung)}


@pytest.mark.parametrize("overhead", [0.02, 0.06, 0.1])
def test_a_budget_is_kept(overhead: float) -> None:
    plan = Plan(CASES, tuple(Rung), rounds=3, warmup=0.03, seconds=0.4, budget=42)
    elapsed = 0.0
    for done in range(plan.cells()):
        elapsed += plan.warmup + plan.seconds_now(elapsed, done) + overhead
    assert elapsed <= 42


def test_a_spent_budget_cuts_the_third_round() -> None:
    plan = Plan(CASES, tuple(Rung), rounds=3, warmup=0.03, seconds=0.4, budget=42)
    assert not plan.is_over(43, 2)
    assert not plan.is_over(41, 3)
    assert plan.is_over(43, 3)
    endless = replace(plan, budget=None)
    assert not endless.is_over(1e6, 3)


def test_the_defaults_are_everything() -> None:
    plan = make_plan(arguments())
    assert (plan.cases, plan.rungs, plan.budget) == (CASES, tuple(Rung), None)


def test_a_choice_keeps_the_fixed_order() -> None:
    plan = make_plan(arguments("--rungs", "ebpf+sockmap, direct", "--cases", "bulk-1KiB,echo-64B"))
    assert plan.rungs == (Rung.DIRECT, Rung.SOCKMAP)
    assert [case.name for case in plan.cases] == ["echo-64B", "bulk-1KiB"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rungs", "udp"), r"--rungs: 'udp' is none of: direct, unix"),
        (("--cases", "echo-64B,"), r"--cases: '' is none of: echo-64B"),
        (("--rounds", "1"), r"--rounds: 1 is not in 2-1000; one round has no spread"),
        (("--seconds", "0.01"), r"--seconds: 0.01 is not in 0.05-60"),
        (("--seconds", "nan"), r"--seconds: nan is not in 0.05-60"),
        (("--quick", "--rounds", "5"), r"--rounds: --quick sets it"),
    ],
)
def test_a_wrong_option_is_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(arguments(*words))


def test_the_cpu_is_one_of_those_allowed() -> None:
    assert choose_cpu(None, {0, 2, 3}) == 3
    assert choose_cpu(2, {0, 2, 3}) == 2
    with pytest.raises(InputError, match=r"--cpu: 1 is not a CPU .* choose of: 0, 2, 3"):
        choose_cpu(1, {0, 2, 3})


def test_an_unwritable_file_is_found_before_measuring(tmp_path: Path) -> None:
    wrong = tmp_path / "nowhere" / "page.html"
    with pytest.raises(InputError, match=r"page\.html: cannot be written: No such file"):
        run(arguments("--html", str(wrong)), StringIO())
