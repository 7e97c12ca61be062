"""favor in Python: `favor.train(model, rows, ...)` and its like. The functions are in calls.py."""
