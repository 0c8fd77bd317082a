"""`python -m afd` is `afd`."""

from afd.cli import main

main()
