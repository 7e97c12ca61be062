"""`favor ask`: which pairs to label next for a model, and when it is enough."""
