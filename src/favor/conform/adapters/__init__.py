"""Trainers that come with adapters."""
