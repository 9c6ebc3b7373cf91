"""Every error kreg raises on purpose. Each message says what was asked, what was found, and what to do."""

from __future__ import annotations


class KregError(Exception):
    """Base of kreg's own errors."""


class SpecError(KregError, ValueError):
    """A kernel spec, op or rule that is malformed, or that clashes with one already registered."""


class SelectionError(KregError, ValueError):
    """A choice of kernels or of a device that cannot hold: unknown names, or kernels that exclude each other."""


class CaptureError(KregError, RuntimeError):
    """The model could not be captured as a graph; carries the exporter's own reason."""


class ArtifactError(KregError, RuntimeError):
    """A saved program that this version of kreg cannot read or lower."""
