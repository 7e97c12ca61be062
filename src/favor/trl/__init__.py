"""Coming from TRL: what its names are called here (names.py), and its configurations as recipes (recipe.py)."""
