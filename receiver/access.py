"""Who may connect: senders by AE title and network, and TLS (PS3.15 annex B)."""

import ssl
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from herald.config import ReceiverConfig
from herald.errors import ConfigError

ANY_AE_TITLE: Final = "*"


class AllowedSenders:
    """Whether a sender is on the list; an empty list allows all. Raises ConfigError for an entry that is none."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = [_entry(text) for text in entries]

    def __call__(self, ae_title: str, address: str) -> bool:
        """Whether this AE title may connect from this address."""
        if not self._entries:
            return True
        peer = _address(address)
        return any(
            title in (ANY_AE_TITLE, ae_title) and (network is None or (peer is not None and peer in network))
            for title, network in self._entries
        )


def _entry(text: str) -> tuple[str, IPv4Network | IPv6Network | None]:
    title, at, network = text.strip().partition("@")
    title = title.strip()
    try:
        if not title or len(title) > 16 or "\\" in title:
            raise ValueError("the AE title must have 1 to 16 characters; * stands for any")
        return title, ip_network(network.strip(), strict=False) if at else None
    except ValueError as error:
        raise ConfigError(
            f"receiver.allowed_senders: {text!r} is no sender ({error}); write CT1, CT1@10.0.0.0/24 or *@10.0.0.5"
        ) from error


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # a listener on :: sees IPv4 senders as ::ffff:a.b.c.d
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def tls_context(config: ReceiverConfig) -> ssl.SSLContext:
    """The server side of TLS 1.2 or later (BCP 195 profile); raises ConfigError that names what cannot be used."""
    if not config.tls_certificate or not config.tls_key:
        raise ConfigError("receiver.tls_port is set: receiver.tls_certificate and receiver.tls_key are needed too")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key)
    except OSError as error:
        raise ConfigError(
            f"receiver.tls_certificate {config.tls_certificate} with receiver.tls_key {config.tls_key} "
            f"cannot be used: {error}; both must be PEM files that belong together"
        ) from error
    if config.tls_client_ca:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except OSError as error:
            raise ConfigError(f"receiver.tls_client_ca {config.tls_client_ca} cannot be used: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context
