"""`python -m anyhyve`: the command line."""

from vmm.cli.main import main

main(prog_name="anyhyve")
