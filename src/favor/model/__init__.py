"""Causal LMs: loading, tree attention, log-probs, sampling."""
