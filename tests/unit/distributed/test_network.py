"""gloo gets the interface by which the other ranks are reached, as the kernel's routes say it."""

import psutil
import pytest

from dist_deeplab.distributed import network
from dist_deeplab.distributed.network import address_towards, choose_gloo_interface, interface_of


def loopback() -> str:
    return next(name for name, addresses in psutil.net_if_addrs().items() if addresses[0].address == "127.0.0.1")


def test_the_route_to_this_host_is_the_loopback_interface() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == loopback()


def test_unknown_hosts_and_addresses_have_none() -> None:
    assert address_towards("no-such-host.invalid") == ""
    assert interface_of("192.0.2.1") == ""
    assert interface_of("") == ""


def test_a_single_host_connects_by_its_own_route() -> None:
    environ: dict[str, str] = {}
    assert choose_gloo_interface("127.0.0.1", ["127.0.0.1"] * 2, environ=environ) == loopback()
    assert environ == {"GLOO_SOCKET_IFNAME": loopback()}


def test_what_the_user_set_is_kept() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "ib0"}
    assert choose_gloo_interface("127.0.0.1", ["127.0.0.1"], environ=environ) == "ib0"
    assert environ == {"GLOO_SOCKET_IFNAME": "ib0"}


def test_a_main_host_that_knows_itself_by_a_loopback_address_takes_the_route_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Debian's /etc/hosts names a host 127.0.1.1, which other hosts cannot reach."""
    [own, *_] = psutil.net_if_addrs()[loopback()]
    addresses = {"lo": [own._replace(address="127.0.1.1")], "eth0": [own._replace(address="10.0.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(network, "address_towards", {"10.0.0.2": "10.0.0.1"}.__getitem__)
    environ: dict[str, str] = {}
    assert choose_gloo_interface("127.0.1.1", ["127.0.1.1", "10.0.0.2"], environ=environ) == "eth0"
    assert environ == {"GLOO_SOCKET_IFNAME": "eth0"}
