"""Losses: pure functions of a pair, a ranking or a rated response, and the table that names them (table.py)."""
