"""Which algorithm each layer can afford, from what it loses while dense videos are made."""
