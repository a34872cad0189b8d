"""PCI: functions, and the bridges of a PC."""
