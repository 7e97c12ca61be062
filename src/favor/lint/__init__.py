"""Faults of preference data, found before they cost training: `favor lint`."""
