"""``python -m kreg.cli``."""

from kreg.cli.app import main

main()
