"""Which addresses may be connected to, and what a name resolves to, in time."""

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.causes import FetchError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


def check_address(address: str, allowed: Sequence[Network] = ()) -> None:
    """Raise FetchError unless ``address`` (an IP literal) is public, or in one of the ``allowed`` networks.

    IPv4 addresses in IPv6 clothes (mapped, 6to4, NAT64, ISATAP) are judged as what they stand for.
    """
    for ip in _stands_for(ipaddress.ip_address(address.split("%")[0])):
        if any(ip in network for network in allowed):
            continue
        is_site_local = ip.version == 6 and ip.is_site_local
        if not ip.is_global or ip.is_multicast or ip.is_reserved or ip.is_unspecified or is_site_local:
            raise FetchError("private_address", address)


def _stands_for(ip: Any) -> Iterator[Any]:
    if ip.version == 4:
        yield ip
        return
    last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    inner = ip.ipv4_mapped or ip.sixtofour or (last if ip in _NAT64 else None)
    yield inner or ip
    if (int(ip) >> 32) & 0xFFFFFFFF in _ISATAP:
        yield last


def resolve(host: str, port: int, ends: float) -> list[Any]:
    """Addresses of ``host`` as ``getaddrinfo`` gives them.

    Args:
        ends: until then, by the monotonic clock; the system's own patience with silent name servers is longer.

    Raises:
        OSError: there are none; a TimeoutError: not in time.
    """
    if _is_literal(host):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            found.append(error)

    # A call of the system that nothing can end: whoever asked leaves it behind.
    asking = threading.Thread(target=ask, name="resolve", daemon=True)
    asking.start()
    asking.join(max(ends - time.monotonic(), 0.0))
    if not found:
        raise TimeoutError("the name server is silent")
    if isinstance(found[0], Exception):
        raise found[0]
    addresses: list[Any] = found[0]
    return addresses


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return True
