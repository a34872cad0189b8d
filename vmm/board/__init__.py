"""Which chips a machine has, and how they are wired."""
