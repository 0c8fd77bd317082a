"""AFD Mesh: attention and FFN of a large language model decoded in separate services."""

from afd.client import Client, Stream, SyncClient, Token
from afd.errors import AfdError

__all__ = ["AfdError", "Client", "Stream", "SyncClient", "Token"]
__version__ = "0.1.0"
