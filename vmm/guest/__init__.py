"""What runs in a machine: images, the Debian guest, archives and symbols."""
