"""The machine: parts that are saved, a run loop, moments to come back to."""
