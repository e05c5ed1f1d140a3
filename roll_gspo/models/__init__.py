"""Models: tiny ones made on the spot, their size, and the mapping between weight layouts."""
