"""`python -m vmm`: the command line."""

from vmm.cli.main import main

main()
