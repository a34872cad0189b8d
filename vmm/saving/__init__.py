"""From a machine to a file and back."""
