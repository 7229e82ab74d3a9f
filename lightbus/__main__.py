"""`python -m lightbus`."""

from lightbus.cli import main

main(prog_name="lightbus")
