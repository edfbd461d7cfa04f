"""Pages as signed webhooks (https://www.standardwebhooks.com), for a hospital's own software."""

import base64
import binascii
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import requests
from standardwebhooks import Webhook

from herald.config import NotifierConfig, required_secret
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError
from herald.events import SeriesTriaged, utc_now
from notifier.channels import Message
from notifier.message import DISCLAIMER, accession_suffix, likelihood

TIMEOUT_S = (3.0, 10.0)
"""To connect, and to wait for the answer."""

FEWEST_SECRET_BYTES = 16


class WebhookChannel:
    """One URL to which pages are posted as JSON; `webhook-id` is the same whenever the same page is sent again."""

    def __init__(self, url: str, config: NotifierConfig) -> None:
        try:
            parts = urlsplit(url)
            port = f":{parts.port}" if parts.port else ""
        except ValueError as error:
            raise ConfigError(
                f"notifier.steps.to is not a URL for a webhook: {error}; use https://HOST/PATH"
            ) from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("notifier.steps.to is not a URL for a webhook; use https://HOST/PATH or http://HOST/PATH")
        self.recipient = f"{parts.scheme}://{parts.hostname}{port}/…"  # a path or query is often a secret
        self._url = parts._replace(netloc=f"{parts.netloc.rpartition('@')[2]}").geturl()
        self._user = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        self._webhook = _signer(config.webhook_secret)

    def send(self, message: Message) -> None:
        """Return when the receiver has answered 2xx.

        Raises ChannelUnavailable while it cannot be reached or answers 408, 429 or 5xx, else ChannelRefused.
        """
        body = payload(message)
        now = utc_now()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Herald",
            "webhook-id": message.page_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._webhook.sign(message.page_id, now, body.decode()),
        }
        try:
            with requests.post(
                self._url,
                data=body,
                headers=headers,
                auth=self._authorize,
                timeout=TIMEOUT_S,
                allow_redirects=False,  # a redirect to a log-in page is no success
                stream=True,  # the status is all that is wanted, however much else is sent
            ) as response:
                status, reason = response.status_code, str(response.reason)[:100]
        except ValueError as error:
            raise ChannelRefused(
                f"{self.recipient} is no URL: {type(error).__name__}; check notifier.steps.to"
            ) from error
        except requests.RequestException as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise ChannelRefused(
                    f"{self.recipient} has a certificate that does not verify; use the name in the certificate in "
                    "notifier.steps.to, and name its authority with REQUESTS_CA_BUNDLE"
                ) from error
            raise ChannelUnavailable(
                # not the error's own words, which hold the path
                f"{self.recipient} cannot be reached: {type(error).__name__}; check notifier.steps.to and its receiver"
            ) from error
        if 200 <= status < 300:
            return
        said = f"{self.recipient} answered {status} {reason}"
        if status >= 500 or status in (408, 429):
            raise ChannelUnavailable(f"{said}; it will be tried again")
        raise ChannelRefused(f"{said}; check notifier.steps.to, notifier.webhook_secret and the receiver's log")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """The user of the URL or none; never one from a .netrc."""
        return requests.auth.HTTPBasicAuth(*self._user)(request) if self._user else request


def payload(message: Message) -> bytes:
    """The JSON that is signed: `type`, `timestamp` and `data`, without UIDs and with a part of the accession number."""
    data: dict[str, Any] = {
        "page_id": message.page_id,
        "subject": message.subject,
        "text": message.body,
        "short": message.short,
        "link": message.link,
    }
    event = message.event
    if event is not None:
        data |= _result(event)
    body = {
        "type": "herald.page" if event else "herald.notice",
        "timestamp": event.occurred_at if event else utc_now(),
        "data": data,
    }
    return msgspec.json.encode(body)


def _result(event: SeriesTriaged) -> dict[str, Any]:
    return {
        "disclaimer": DISCLAIMER,
        "disposition": event.disposition,
        "uncertain": event.uncertain,
        "revision": event.revision,
        "findings": [
            {
                "kind": finding.kind,
                "probability": finding.probability,
                "likelihood": likelihood(finding.probability),
                "volume_ml": finding.volume_ml,
                "slice": finding.slice,
            }
            for finding in event.findings
        ],
        "slice_count": event.slice_count,
        "scanner": event.scanner or event.calling_ae_title,
        "accession_suffix": accession_suffix(event.accession_number),
        "last_image_at": event.last_image_at,
    }


def _signer(secret: str) -> Webhook:
    encoded = required_secret(secret, "notifier.webhook_secret").removeprefix("whsec_")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < FEWEST_SECRET_BYTES:
        raise ConfigError(
            f"notifier.webhook_secret is not base 64 of at least {FEWEST_SECRET_BYTES} bytes, with or without whsec_ "
            "before it; make one with `openssl rand -base64 32`"
        )
    return Webhook(key)
