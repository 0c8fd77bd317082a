"""Addresses, as gRPC and URLs have them."""

from __future__ import annotations


def joined(host: str, port: int) -> str:
    """host:port; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
