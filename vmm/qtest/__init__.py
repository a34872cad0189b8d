"""Devices without a machine, driven by text; QEMU as their judge."""
