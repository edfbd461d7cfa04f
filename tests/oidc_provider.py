"""A small OpenID Connect provider on loopback for tests: real HTTP, real keys, and the checks that a real one makes."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_urlsafe
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey

CLIENT_ID = "herald"
CLIENT_SECRET = "client secret for tests"
SIGNING_KEY = RSAKey.generate_key(2048, {"kid": "first", "use": "sig", "alg": "RS256"})
OTHER_KEY = RSAKey.generate_key(2048, {"kid": "first", "use": "sig", "alg": "RS256"})

Claims = dict[str, Any]


@dataclass
class Provider:
    """What it says, and what it was asked; `tamper` changes the claims of an ID token before they are signed."""

    issuer: str = ""
    person: Claims = field(default_factory=lambda: {"sub": "0042", "preferred_username": "olga", "groups": ["ct"]})
    tamper: Callable[[Claims], Claims] = lambda claims: claims
    signing_key: RSAKey | OctKey = field(default_factory=lambda: SIGNING_KEY)
    published_keys: list[RSAKey | OctKey] = field(default_factory=lambda: [SIGNING_KEY])
    header: Claims = field(default_factory=lambda: {"alg": "RS256", "kid": "first"})
    discovery: Claims = field(default_factory=dict)
    with_id_token: bool = True
    failing: str = ""
    """Path that answers 500."""
    hold: threading.Event | None = None
    """While it is not set, the token endpoint does not answer."""
    waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    asked: list[Claims] = field(default_factory=list)
    """Parameters of the authorization requests."""
    refused: list[str] = field(default_factory=list)
    """Why the token endpoint gave nothing."""
    codes: dict[str, Claims] = field(default_factory=dict)

    def document(self) -> Claims:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/jwks",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["none", "HS256", "RS256"],
            "scopes_supported": ["openid", "profile", "email", "groups"],
            **self.discovery,
        }

    def allow(self, asked: Claims) -> str:
        """The person agrees: where the browser is sent back to."""
        code = token_urlsafe(24)
        self.codes[code] = asked
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    def redeem(self, given: Claims, authorization: str) -> tuple[int, Claims]:
        """What the token endpoint answers (RFC 6749 5, RFC 7636 4.6)."""
        expected = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        asked = self.codes.pop(given.get("code", ""), None)  # a code is good once
        challenge = sha256(given.get("code_verifier", "").encode()).digest()
        if authorization != f"Basic {expected}":
            return self._refuse(401, "invalid_client")
        if given.get("grant_type") != "authorization_code" or asked is None:
            return self._refuse(400, "invalid_grant")
        if base64.urlsafe_b64encode(challenge).decode().rstrip("=") != asked["code_challenge"]:
            return self._refuse(400, "invalid_grant")
        if given.get("redirect_uri") != asked["redirect_uri"]:
            return self._refuse(400, "invalid_grant")
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": CLIENT_ID, "iat": now, "exp": now + 300, "nonce": asked["nonce"]}
        token = {"access_token": token_urlsafe(24), "token_type": "Bearer", "expires_in": 300}
        if self.with_id_token:
            token["id_token"] = jwt.encode(
                self.header,
                self.tamper({**claims, **self.person}),
                self.signing_key,
                algorithms=[self.header["alg"]],
            )
        return 200, token

    def _refuse(self, status: int, error: str) -> tuple[int, Claims]:
        self.refused.append(error)
        return status, {"error": error, "error_description": "<b>words of the provider</b>"}


def _handler(provider: Provider) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            given = {key: values[0] for key, values in parse_qs(parts.query).items()}
            if provider.failing == parts.path:
                self._send(500, b"<h1>broken</h1>", "text/html")
            elif parts.path == "/.well-known/openid-configuration":
                self._send_json(200, provider.document())
            elif parts.path == "/jwks":
                keys = [key.as_dict(private=False) for key in provider.published_keys]
                self._send_json(200, {"keys": keys})
            elif parts.path == "/authorize":
                provider.asked.append(given)
                hidden = "".join(
                    f'<input type="hidden" name="{escape(key)}" value="{escape(value)}">'
                    for key, value in given.items()
                )
                icon = "<link rel='icon' href='data:,'>"  # or a browser would ask for one
                form = f"<form action='/allow'>{hidden}<button>Allow</button></form>"
                page = f"<!doctype html><title>Provider</title>{icon}{form}"
                self._send(200, page.encode(), "text/html")
            elif parts.path == "/allow":
                self.send_response(302)
                self.send_header("Location", provider.allow(given))
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._send(404, b"", "text/plain")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            provider.waiting.release()
            if provider.hold is not None:
                provider.hold.wait(30)
            if provider.failing == "/token":
                self._send(500, b"<h1>broken</h1>", "text/html")
                return
            given = {key: values[0] for key, values in parse_qs(body).items()}
            self._send_json(*provider.redeem(given, self.headers.get("Authorization", "")))

        def _send_json(self, status: int, value: Claims) -> None:
            self._send(status, json.dumps(value).encode(), "application/json")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def running_provider() -> Iterator[Provider]:
    """A provider on a free port for the block; closing the block takes it down."""
    provider = Provider()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(provider))
    provider.issuer = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)
