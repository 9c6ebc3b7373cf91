"""The report: its data, its table for the terminal, its page for the browser."""

from kreg.rewriters.report.model import (
    Alternative,
    Calls,
    NearMissReport,
    Report,
    Seconds,
    SiteReport,
    Verification,
)

__all__ = ["Alternative", "Calls", "NearMissReport", "Report", "Seconds", "SiteReport", "Verification"]
