"""Responses made by a model: engines, files of samples, preferences made from them."""
