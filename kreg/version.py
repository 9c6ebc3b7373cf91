"""The version of kreg that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kreg")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
