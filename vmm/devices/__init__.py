"""Device models: one file a chip, with its datasheet and what is absent at its head."""
