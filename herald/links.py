"""The signed link in a page: the notifier signs it, the web UI verifies it, and it expires.

The link names a series revision by UID and nothing else, so that it may pass through a pager's network.
"""

from datetime import UTC, datetime, timedelta

import msgspec
from itsdangerous import BadData, URLSafeTimedSerializer

from herald.config import WebuiConfig, required_secret
from herald.errors import LinkError
from herald.events import utc_now

_SALT = "herald.page"


class ReviewLink(msgspec.Struct, frozen=True, array_like=True):
    """What the link in a page points at."""

    study_instance_uid: str
    series_instance_uid: str
    revision: int


def sign_link(config: WebuiConfig, study_uid: str, series_uid: str, revision: int) -> str:
    """The URL of a series revision for a page; raises ConfigError without `webui.secret_key`."""
    token = _serializer(config).dumps([study_uid, series_uid, revision])
    base = config.public_url or f"http://{config.host}:{config.port}"
    return f"{base.rstrip('/')}/page/{token}"


def verify_link(config: WebuiConfig, token: str) -> ReviewLink:
    """What a token stands for; raises LinkError when it is forged, damaged or older than `webui.link_hours`."""
    try:
        payload, signed_at = _serializer(config).loads(token, return_timestamp=True)
        link = msgspec.convert(payload, ReviewLink)
    except (BadData, msgspec.ValidationError) as error:
        raise LinkError(
            "the link is damaged or was not signed by this node; open it from the page again, or log in and use "
            "the worklist"
        ) from error
    # The age is checked here because itsdangerous calls a link from a clock one second ahead expired.
    if utc_now() - signed_at.astimezone(UTC) > timedelta(hours=config.link_hours):
        raise LinkError(f"{_expired(config, signed_at)}; log in and use the worklist")
    return link


def _serializer(config: WebuiConfig) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(required_secret(config.secret_key, "webui.secret_key"), salt=_SALT)


def _expired(config: WebuiConfig, signed_at: datetime) -> str:
    return f"the link of {signed_at:%Y-%m-%d %H:%M} UTC has expired: links are valid for {config.link_hours:g} hours"
