"""`python -m herald` is the command `herald`."""

from herald.cli import main

main()
