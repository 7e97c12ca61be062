"""What changed between two models on the same prompts, as a page and as a gate of releases."""
