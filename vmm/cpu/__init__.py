"""The contract of a CPU backend, the model it shows, and what is known of an x86-64 CPU without running one."""
