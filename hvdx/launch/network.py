"""This machine's IPv4 addresses and interfaces."""

from __future__ import annotations

import socket

import psutil

from hvdx.errors import LaunchError


def addresses() -> dict[str, str]:
    """Return this machine's IPv4 addresses, each with its interface."""
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }


def is_local(address: str) -> bool:
    """Return whether ``address`` is this machine's, loopback included.

    Debian maps a machine's own name to 127.0.1.1, which no interface lists.
    """
    return address.startswith("127.") or address in addresses()


def loopback() -> str:
    """Return the name of the loopback interface, on Linux ``lo``."""
    return addresses().get("127.0.0.1", "lo")


def resolve(host: str) -> str | None:
    """Return the IPv4 address of ``host``, None if the name is unknown."""
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError):
        return None


def address_of(interface: str) -> str:
    """Return the IPv4 address of ``interface``.

    Raises:
        LaunchError: there is no such interface, or it has no IPv4 address.
    """
    known = {name: address for address, name in reversed(addresses().items())}
    if interface not in known:
        listed = ", ".join(f"{name} ({address})" for name, address in known.items())
        raise LaunchError(
            f"this machine has no network interface {interface!r} with an IPv4 address. "
            f"It has {listed}: name one of these."
        )
    return known[interface]


def route_to(address: str) -> tuple[str, str]:
    """Return interface and own address from which packets to ``address`` leave.

    Connecting a UDP socket asks the kernel for the route and sends nothing.

    Raises:
        LaunchError: there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise LaunchError(f"there is no route to {address}: {error.strerror}") from None
        own = str(probe.getsockname()[0])
    return addresses().get(own, loopback()), own
