"""Training loops and what they stand on."""
