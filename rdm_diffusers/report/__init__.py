"""`report.html` of a run: its curves, images, alarms, settings and metrics on one page that needs no network."""

from .page import REPORT, Report, Status

__all__ = ["REPORT", "Report", "Status"]
