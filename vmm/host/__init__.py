"""This computer's ends of a machine; never in a snapshot."""
