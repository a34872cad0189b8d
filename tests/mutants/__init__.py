"""What the tests are worth: faults are planted in the code, one at a time, and the tests of its own folder must find
them. `python -m tests.mutants --help`."""
