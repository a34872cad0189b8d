"""The PC/AT's chips, on ISA ports."""
