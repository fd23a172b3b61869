"""placeholder"""

from redirector.compare.report.data import Report


def render(report: Report) -> str:
    return ""
