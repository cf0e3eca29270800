"""What an operator writes for a host's address, and what interfaces have."""

from __future__ import annotations

import socket
import sys

import pytest

from moebius.errors import ConfigError
from moebius.parallel.endpoint import address_towards, interface_address, parse_endpoint


def test_an_endpoint_is_read() -> None:
    assert parse_endpoint("10.0.0.1:29500", "--x") == ("10.0.0.1", 29500)
    assert parse_endpoint("host.example:1", "--x") == ("host.example", 1)
    assert parse_endpoint("[fd00::1]:65535", "--x") == ("fd00::1", 65535)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "host:-1", "fd00::1:5"]
)
def test_what_is_none_is_refused_by_its_options_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--rdzv-endpoint is"):
        parse_endpoint(text, "--rdzv-endpoint")


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are asked for their address there")
def test_an_interface_has_an_address() -> None:
    assert interface_address("lo") == "127.0.0.1"
    for name in ("", "no-such-one", "longer-than-any-interface"):
        with pytest.raises(ConfigError, match=r"--cluster-interface is .* there are: .*\blo\b"):
            interface_address(name)


def test_the_address_that_others_see() -> None:
    assert address_towards("127.0.0.1", 1) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"no way leads from here to no\.such\.host\.invalid:1"):
        address_towards("no.such.host.invalid", 1)
    assert socket.inet_aton(address_towards("localhost", 1))
