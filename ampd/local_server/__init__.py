"""A PostgreSQL server of one's own, for `ampd solo` and for tests: `from ampd.local_server import local_server`."""

from .installation import Installation as Installation
from .server import LocalServer as LocalServer
from .server import local_server as local_server

__all__ = ["Installation", "LocalServer", "local_server"]
