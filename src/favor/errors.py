"""The errors favor raises for people.

In: nothing. Out: one base class and five kinds; the CLI turns each into one line. Next: config.py.
"""


class FavorError(Exception):
    """A message for the user: what was found, where (file, row or key), and what to do."""

    exit_code = 2


class ConfigError(FavorError):
    """A recipe, an override or a combination of options cannot work."""


class DataError(FavorError):
    """A preference file, a row or its tokens cannot be used as they are."""


class CheckpointError(FavorError):
    """A model, checkpoint or reference store is missing, damaged or stale."""


class NumericsError(FavorError):
    """A number that must hold does not: a failed self-check, a loss that is not finite."""


class ServerError(FavorError):
    """A model server refused a request, or gave no usable reply however often it was asked."""
