"""Who asks, where reverse proxies stand in front: X-Forwarded-For is believed of those we know, and of nobody else."""

from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from flask import Flask

from herald.errors import ConfigError

Networks = tuple[IPv4Network | IPv6Network, ...]
Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]


def init_app(app: Flask, trusted_proxies: tuple[str, ...]) -> None:
    """Take addresses from these proxies; raises ConfigError that names the entry which is no address or network."""
    networks = _networks(trusted_proxies)
    if networks:
        app.wsgi_app = _behind(app.wsgi_app, networks)  # type: ignore[method-assign,assignment]


def client_address(peer: str, forwarded_for: str, trusted: Networks) -> str:
    """The last address of the chain that is no proxy of ours: what stands before it may be made up."""
    here = peer
    for hop in reversed(forwarded_for.split(",")):
        before = _address(hop)
        if before is None or not _is_trusted(here, trusted):
            break
        here = str(before)
    return here


def _behind(application: Wsgi, networks: Networks) -> Wsgi:
    def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        peer, forwarded_for = environ.get("REMOTE_ADDR", ""), environ.pop("HTTP_X_FORWARDED_FOR", "")
        environ["REMOTE_ADDR"] = client_address(peer, forwarded_for, networks)
        return application(environ, start_response)

    return serve


def _networks(entries: tuple[str, ...]) -> Networks:
    networks = []
    for entry in entries:
        try:
            networks.append(ip_network(entry.strip()))
        except ValueError as error:
            raise ConfigError(
                f"webui.trusted_proxies: {entry!r} is no address and no network, as in 10.0.0.5 or 10.0.0.0/24: {error}"
            ) from error
    return tuple(networks)


def _is_trusted(address: str, networks: Networks) -> bool:
    parsed = _address(address)
    return parsed is not None and any(parsed in network for network in networks)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The address, without the port that some proxies add; an IPv4 one also where it comes as IPv6."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
