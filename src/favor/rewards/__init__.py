"""What gives a response its score: a reward model, an implicit reward, a classifier, or a function of yours."""
