"""Which network interface this rank reaches the others by: gloo must be told, and asks the host's name if it is not.

On some Debian hosts and pods that name is a loopback address, which the other nodes cannot reach (ray#37461).
"""

import contextlib
import os
import resource
import socket
from collections.abc import MutableMapping, Sequence

import psutil

_ANY_PORT = 9  # discard; nothing is sent: connecting a UDP socket only chooses a route
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"  # NCCL chooses well by itself on most hosts


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one: rank 0's store, and gloo, have a connection to each rank."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems refuse an unlimited number
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def address_towards(host: str) -> str:
    """This host's own address on the route to `host`, or an empty string where `host` is unknown or unreachable."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def interface_of(address: str) -> str:
    """Name of the network interface that has an address, or an empty string."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return ""


def choose_gloo_interface(own: str, others: Sequence[str], *, environ: MutableMapping[str, str] = os.environ) -> str:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to the interface by which the others are reached; its name.

    Args:
        own: this rank's address on the route to rank 0.
        others: the same of all ranks. Rank 0's host may know itself by a loopback address while others reach it from
            elsewhere: then the route to one of those counts.
        environ: where to set it.
    """
    if environ.get(GLOO_INTERFACE):
        return environ[GLOO_INTERFACE]
    elsewhere = [address for address in others if not _is_loopback(address)]
    name = interface_of(address_towards(elsewhere[0]) if _is_loopback(own) and elsewhere else own)
    if name:
        environ[GLOO_INTERFACE] = name
    return name


def _is_loopback(address: str) -> bool:
    return not address or address.startswith("127.") or address == "::1"
