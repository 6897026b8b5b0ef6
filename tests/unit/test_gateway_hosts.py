"""Under which names a gateway answers, and to whose pages."""

from __future__ import annotations

import pytest

from client.gateway.door.hosts import Hosts, Origins, check_origins, host_of

PEOPLE = "http://192.168.1.7:8000"


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST:8000", "localhost"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("example.org.", "example.org"),
        ("example.org:", "example.org"),
        ("", None),
        ("a b", None),
        ("example.org:http", None),
        ("[::1", None),
        ("[example.org]", None),
        ("evil.example/127.0.0.1", None),
        ("user@127.0.0.1", None),
        ("::1", None),
    ],
)
def test_the_host_in_a_header(header, host):
    assert host_of(header) == host


@pytest.mark.parametrize(
    "header", ["localhost:8000", "127.0.0.1", "127.0.0.1:9", "[::1]:8000", "page.localhost", "127.8.8.8"]
)
def test_the_names_of_the_loopback_are_answered(header):
    assert Hosts().admits(header)


@pytest.mark.parametrize(
    "header",
    ["evil.example", "localhost.evil.example", "192.168.1.7", "", "0.0.0.0", "127.0.0.1.nip.example"],
)
def test_on_the_loopback_no_other_name_is_answered(header):
    assert not Hosts().admits(header)


def test_elsewhere_every_address_is_answered_and_no_name():
    hosts = Hosts("0.0.0.0")
    assert hosts.admits("192.168.1.7:8000")
    assert hosts.admits("[2001:db8::1]:8000")
    assert not hosts.admits("evil.example")
    assert Hosts("gateway.lan").admits("gateway.lan:8000")


def test_allowed_names_and_domains():
    hosts = Hosts(allowed=("api.example.org", ".example.net", "*.example.com"))
    for header in ("API.example.org:80", "example.net", "a.b.example.net", "x.example.com", "example.com"):
        assert hosts.admits(header), header
    for header in ("example.org", "evilexample.net", "api.example.org.evil.example"):
        assert not hosts.admits(header), header
    assert Hosts(allowed=("*",)).admits("anything.example")


def test_a_gateway_s_own_page_may_ask_and_a_stranger_s_may_not():
    origins = Origins()
    assert origins.admits("http://127.0.0.1:8000", "127.0.0.1:8000")
    assert origins.admits(PEOPLE, "192.168.1.7:8000")
    for origin in ("http://127.0.0.1:9000", "https://evil.example", "null", "", "file://", "http://["):
        assert not origins.admits(origin, "127.0.0.1:8000"), origin


def test_allowed_origins():
    origins = Origins(("https://app.example.org/",))
    assert origins.admits("https://app.example.org", "127.0.0.1")
    assert not origins.admits("http://app.example.org", "127.0.0.1")
    assert Origins(("*",)).admits("https://evil.example", "127.0.0.1")
    assert Origins(("*",)).headers("https://evil.example")["access-control-allow-origin"] == "*"
    assert origins.headers("https://app.example.org")["vary"] == "Origin"


def test_a_preflight_names_the_headers_that_were_asked_for():
    asked = {"access-control-request-headers": "authorization, x-stainless-os, bad header\r\n"}
    assert Origins().preflight(asked)["access-control-allow-headers"] == "authorization, x-stainless-os"


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/path", "https://", ""])
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(origin):
    with pytest.raises(ValueError, match="--cors-origin"):
        check_origins([origin])
    check_origins(["https://example.org", "http://localhost:3000", "*"])
