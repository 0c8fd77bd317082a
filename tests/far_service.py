"""A service that runs in the network namespace of the name in LINK_NAMESPACE."""

from __future__ import annotations

import ctypes
import importlib
import os

_CLONE_NEWNET = 0x40000000


def main() -> None:
    with open(f"/run/netns/{os.environ['LINK_NAMESPACE']}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "the network namespace cannot be entered")
    role, _, _ = os.environ["AFD_REPLICA_ID"].partition("-")
    importlib.import_module(f"services.{role}.__main__").main()
