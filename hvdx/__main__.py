"""``python -m hvdx`` is the ``hvdx`` command."""

from hvdx.cli import main

main()
