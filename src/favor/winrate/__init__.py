"""Two models compared by a judge."""
