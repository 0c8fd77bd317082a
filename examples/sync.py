"""Asks without asyncio; leaving the loop, or the time being up, frees everything in the mesh."""

import sys

from afd import SyncClient
from afd.errors import DeadlineExceeded

[target] = sys.argv[1:] or ["localhost:50051"]

with SyncClient(target) as client:
    print(client.get_model().name)
    try:
        for token in client.chat([{"role": "user", "content": 'Spell "rabbit" backwards.'}], timeout_s=30):
            print(token.text, end="", flush=True)
        print()
    except DeadlineExceeded as error:
        sys.exit(str(error))
