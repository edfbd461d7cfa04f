"""Signed links and tokens: whoever holds one may acknowledge a page, and nothing else, until it expires.

A token is 32 letters and digits, short enough for a text of 160 characters and for the local part of a reply address,
and the same in either case. It names a row of `pages`, so neither a UID nor an accession number passes through a
pager's network.
"""

import binascii
import hmac
from base64 import b32decode, b32encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, select

from herald.config import WebuiConfig, required_secret
from herald.errors import LinkError
from herald.events import utc_now
from herald.ledger import pages

_TOKEN_SALT = b"herald.page.token"
_PAGE_BYTES = 8
_TIME_BYTES = 4
_SIGNATURE_BYTES = 8
"""64 bits: guessing is possible only by asking the node, and opens no image."""
TOKEN_LENGTH = 32
"""Characters of a page's token: 20 bytes in base 32."""


@dataclass(frozen=True)
class ReviewLink:
    """What the link in a page points at."""

    study_instance_uid: str
    series_instance_uid: str
    revision: int


def page_link(config: WebuiConfig, page_id: str) -> str:
    """The URL of a page of the ledger; raises ConfigError without `webui.secret_key`."""
    return _url(config, page_token(config, page_id))


def page_token(config: WebuiConfig, page_id: str) -> str:
    """The token of a page, as in its link and its reply address; raises ConfigError without `webui.secret_key`."""
    minute = int(utc_now().timestamp()) // 60
    named = UUID(page_id).bytes[:_PAGE_BYTES] + minute.to_bytes(_TIME_BYTES)
    return b32encode(named + _signature(config, named)).decode().lower()


def follow_link(config: WebuiConfig, connection: Connection, token: str) -> ReviewLink:
    """What the page of a token is about, as its row in the ledger says.

    Raises LinkError when it is forged, damaged or older than `webui.link_hours`, or its page is not in the ledger.
    """
    if len(token) != TOKEN_LENGTH:
        raise _damaged()
    least, most = _verified_range(config, token)
    statement = select(pages.c.study_instance_uid, pages.c.series_instance_uid, pages.c.revision).where(
        pages.c.page_id.between(least, most)  # unlike LIKE, by the index on SQLite too
    )
    row = connection.execute(statement).first()
    if row is None:
        raise LinkError("the link is of a page that the ledger no longer has; log in and use the worklist")
    return ReviewLink(*row)


def reply_address(address: str, token: str) -> str:
    """The address to which a page is answered: LOCAL+TOKEN@DOMAIN (subaddress, RFC 5233)."""
    local, _, domain = address.rpartition("@")
    return f"{local}+{token}@{domain}"


def reply_token(address: str, recipient: str) -> str | None:
    """The token in a recipient that `reply_address` made, whatever has become of its case; None when there is none."""
    beginning, _, domain = recipient.rpartition("@")
    local, _, token = beginning.rpartition("+")
    if f"{local}@{domain}".lower() != address.lower() or len(token) != TOKEN_LENGTH:
        return None
    return token.lower()


def _verified_range(config: WebuiConfig, token: str) -> tuple[str, str]:
    """The least and the greatest id of a page that begin as a token says."""
    try:
        signed = b32decode(token, casefold=True)
    except (binascii.Error, ValueError) as error:
        raise _damaged() from error
    named, signature = signed[:-_SIGNATURE_BYTES], signed[-_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(config, named)):
        raise _damaged()
    _refuse_expired(config, datetime.fromtimestamp(60 * int.from_bytes(named[_PAGE_BYTES:]), UTC))
    beginning = named[:_PAGE_BYTES]
    return str(UUID(bytes=beginning.ljust(16, b"\0"))), str(UUID(bytes=beginning.ljust(16, b"\xff")))


def _signature(config: WebuiConfig, named: bytes) -> bytes:
    key = required_secret(config.secret_key, "webui.secret_key").encode()
    return hmac.digest(hmac.digest(key, _TOKEN_SALT, "sha256"), named, "sha256")[:_SIGNATURE_BYTES]


def _url(config: WebuiConfig, token: str) -> str:
    base = config.public_url or f"http://{config.host}:{config.port}"
    return f"{base.rstrip('/')}/page/{token}"


def _refuse_expired(config: WebuiConfig, signed_at: datetime) -> None:
    if utc_now() - signed_at > timedelta(hours=config.link_hours):
        raise LinkError(
            f"the link of {signed_at:%Y-%m-%d %H:%M} UTC has expired: links are valid for {config.link_hours:g} hours; "
            "log in and use the worklist"
        )


def _damaged() -> LinkError:
    return LinkError(
        "the link is damaged or was not signed by this node; open it from the page again, or log in and use "
        "the worklist"
    )
