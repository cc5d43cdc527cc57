"""``horovod.common``'s modules under hvdx's name: exceptions, process sets, states, helpers.

They need Horovod, and load no framework.
"""

from importlib.util import find_spec

from hvdx.errors import HorovodMissingError

if find_spec("horovod") is None:
    raise HorovodMissingError("Horovod is not installed here: build it with `hvdx install`")
