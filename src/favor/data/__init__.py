"""Preferences as text, ids and tensors; no model here."""
