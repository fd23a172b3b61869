"""The report as JSON: every figure, nothing rounded away."""

import json
from dataclasses import asdict

from redirector.compare.report.data import Report


def render(report: Report) -> str:
    """Return {"host", "rounds", "results", "ratios"}; a latency that a case lacks is null."""
    whole = {
        "host": asdict(report.host),
        "rounds": report.rounds,
        "results": [asdict(result) for result in report.results],
        "ratios": [asdict(ratio) for ratio in report.ratios],
    }
    return json.dumps(whole, indent=1) + "\n"
