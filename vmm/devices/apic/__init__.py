"""The advanced programmable interrupt controllers, and what they say to each other."""
