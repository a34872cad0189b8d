"""Machine code, assembled ahead."""
