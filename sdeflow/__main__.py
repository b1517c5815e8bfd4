"""`python -m sdeflow` is the command line."""

from sdeflow.cli import main

main()
