"""The report: its data, its table for the terminal, its page for the browser."""

from kreg.rewriters.report.model import (
    Alternative,
    Calls,
    NearbyNode,
    NearMissReport,
    Report,
    Seconds,
    SiteReport,
    Verification,
)

__all__ = ["Alternative", "Calls", "NearMissReport", "NearbyNode", "Report", "Seconds", "SiteReport", "Verification"]
