"""Runs as one static page; no torch here."""
