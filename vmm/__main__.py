"""`python -m vmm`: the command line."""

from vmm.cli import main

main()
