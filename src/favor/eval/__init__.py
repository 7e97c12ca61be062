"""Held-out figures that people believe."""
