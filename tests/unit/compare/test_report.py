"""The report says what was measured, in every form; n/a where nothing was, and where eBPF loses."""

import json
import re
from html.parser import HTMLParser

import pytest

from redirector.compare.cases import CASES, Rung, why_not
from redirector.compare.host import Host
from redirector.compare.report import html, table
from redirector.compare.report import json as json_report
from redirector.compare.report.data import Report
from redirector.compare.statistics import Result, ratios

SPEED = {
    Rung.DIRECT: 1.0,
    Rung.UNIX: 1.4,
    Rung.LOOPBACK: 1.2,
    Rung.IPTABLES: 1.0,
    Rung.EBPF: 1.1,
    Rung.SOCKMAP: 2.0,
}


def make_report(rungs: tuple[Rung, ...] = tuple(Rung), streams_lose: bool = True) -> Report:
    """Three rounds with a little noise; the short-circuit loses streams if told to."""
    results: list[Result] = []
    for number in (1, 2, 3):
        for case in CASES:
            for rung in rungs:
                if why_not(case, rung) is not None:
                    continue
                speed = SPEED[rung] * (1 + number / 1000)
                if streams_lose and rung is Rung.SOCKMAP and not case.has_latency:
                    speed = 0.5
                time = 10 / speed
                p50, p90, p99, p999 = (
                    time * factor if case.has_latency else None for factor in (1, 1.2, 2, 9)
                )
                results.append(
                    Result(case.name, rung, number, p50, p90, p99, p999, 1e5 * speed, time)
                )
    host = Host(
        "2026-01-01T00:00:00+00:00", "6.1 <b>", "A & B", 2, 4096, 0.1, 1, "pinned", "1.40.0",
        3, 0.1, 0.5,
    )  # fmt: skip
    return Report(host, 3, CASES, rungs, tuple(results), tuple(ratios(results)))


def test_json_has_every_figure() -> None:
    whole = json.loads(json_report.render(make_report()))
    assert set(whole) == {"host", "rounds", "results", "ratios"}
    assert whole["rounds"] == 3
    assert len(whole["results"]) == 3 * (len(CASES) * len(Rung) - 2)
    assert set(whole["results"][0]) == {
        "case", "rung", "round", "p50_us", "p90_us", "p99_us", "p999_us", "ops_per_s",
        "cpu_us_per_op",
    }  # fmt: skip
    assert set(whole["ratios"][0]) == {
        "case", "rung", "versus", "metric", "median", "low", "high",
    }  # fmt: skip
    stream = next(row for row in whole["results"] if row["case"] == "bulk-1KiB")
    assert stream["p50_us"] is None
    assert stream["ops_per_s"] > 0


def lines_of(text: str, start: str) -> list[str]:
    """The block of lines that begins with `start`, up to the next empty line."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(start))
    end = next((i for i in range(at, len(lines)) if not lines[i]), len(lines))
    return [line.strip() for line in lines[at:end]]


def test_the_table_has_a_row_for_each_rung() -> None:
    block = lines_of(table.render(make_report()), "echo-64B: ")
    assert [line.split()[0] for line in block[2:]] == [rung.value for rung in Rung]
    assert block[7].split()[1:] == ["5.0", "6.0", "10.0", "44.9", "200,400", "4.99"]


def test_a_rung_that_cannot_carry_a_case_says_so() -> None:
    text = table.render(make_report())
    unix = lines_of(text, "http-2-sidecars-c1: ")[3]
    assert unix.split() == ["unix", *["n/a"] * 6]
    assert "n/a: http-2-sidecars-c1 on unix: no Unix socket leads to another pod" in text


def test_the_table_names_losses_with_their_spread() -> None:
    block = lines_of(table.render(make_report()), "Where eBPF loses")
    rows = {tuple(line.split()[:3]) for line in block[2:]}
    assert ("bulk-1KiB", "ebpf+sockmap", "iptables") in rows
    assert ("bulk-1KiB", "ebpf+sockmap", "ebpf") in rows
    assert ("echo-64B", "ebpf", "unix") in rows
    assert ("echo-64B", "ebpf+sockmap", "iptables") not in rows
    line = next(line for line in block if line.startswith("bulk-1KiB") and "iptables" in line)
    assert re.search(r"0\.50 \(0\.50-0\.50\) +2\.00 \(2\.00-2\.01\)$", line)


def test_the_table_says_when_nothing_is_lost() -> None:
    report = make_report((Rung.IPTABLES, Rung.SOCKMAP), streams_lose=False)
    assert "Where eBPF loses: nowhere beyond the spread" in table.render(report)


class Page(HTMLParser):
    """Collects what the tests ask of a page; refuses tags that do not match."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.plots: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.links += [v or "" for k, v in attributes if k in ("href", "src", "xlink:href")]
        if given.get("data-is"):
            self.plots.append(given["data-is"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, _tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attributes if k in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = html.render(make_report())
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert "6.1 <b>" not in text
    assert "6.1 <b>" in page.text


def test_the_page_plots_each_baseline_and_metric() -> None:
    page = Page(html.render(make_report()))
    assert len(page.plots) == len(set(page.plots)) == 3 * 4
    assert "iptables p50_us" in page.plots


def test_the_page_marks_losses() -> None:
    text = html.render(make_report())
    assert 'class="loses product"' in text
    assert "nowhere beyond the spread" not in Page(text).text


@pytest.mark.parametrize("rungs", [(Rung.EBPF,), (Rung.DIRECT, Rung.UNIX)])
def test_a_run_of_few_rungs_can_be_reported(rungs: tuple[Rung, ...]) -> None:
    report = make_report(rungs)
    assert Page(html.render(report)).open == []
    assert table.render(report)
