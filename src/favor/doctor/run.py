"""`favor doctor`: every part is asked in turn, and says a line as soon as it knows; one that torch stops leaves the others be.

In: DoctorConfig. Out: Signs. Next: software.py.
"""

from collections.abc import Iterator

from favor.doctor.caches import caches, hub, hub_folder
from favor.doctor.machine import disks, processor, room_said
from favor.doctor.settings import DoctorConfig, Sign
from favor.doctor.software import imported, software


def signs(config: DoctorConfig) -> Iterator[Sign]:
    """Every finding, in the order in which they are asked. Nothing is written but a file that is removed at once."""
    yield from software()
    yield (found := imported())
    yield from disks(hub_folder())
    yield from caches()
    yield hub(asked=config.hub)
    yield processor()
    if found.level != "broken":
        yield from _computing(config)


def _computing(config: DoctorConfig) -> Iterator[Sign]:
    """What needs torch."""
    from favor.doctor import speed
    from favor.doctor.subject import model_signs, run_signs

    yield from speed.devices()
    yield speed.threads()
    yield speed.exact()
    if wrong := speed.computed():
        yield wrong
        return
    found, room = speed.measured(), speed.room()
    yield speed.precision(found)
    yield room_said(room)
    yield speed.estimates(found)
    if config.model is not None:
        yield from model_signs(config.model, room, hub=config.hub)
    if config.run is not None:
        yield from run_signs(config.run, room, hub=config.hub)
