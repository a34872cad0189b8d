"""Looking into a machine that runs."""
