"""`favor doctor`: what there is on this machine, what is missing or broken, and what to do about it."""
