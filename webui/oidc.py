"""Log-in by OpenID Connect: authorization code with PKCE, state and nonce; a claim of the ID token gives the role."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, cast
from urllib.parse import urlsplit

import requests
from authlib.common.errors import AuthlibBaseError  # type: ignore[import-untyped]
from authlib.integrations.flask_client import (  # type: ignore[import-untyped]
    FlaskIntegration,
    FlaskOAuth2App,
    OAuthError,
)
from flask import Blueprint, Flask, abort, current_app, render_template, request, session, url_for
from flask.typing import ResponseReturnValue
from joserfc.errors import JoseError

from herald.config import Config
from herald.errors import ConfigError, HeraldError
from webui import record
from webui.context import context
from webui.session import ASK_AGAIN, RETRY_AFTER, address, begin, local, public, refused_too_often
from webui.users import LONGEST_SUBJECT, ROLES, Role, admit, end_sessions

log = logging.getLogger(__name__)
logging.getLogger("authlib").setLevel(logging.INFO)  # at debug it logs code verifiers

blueprint = Blueprint("oidc", __name__, url_prefix="/login/oidc")

EXTENSION = "herald.oidc"
REFUSED = "log-in-refused"

TIMEOUT_S = 5.0
LEEWAY_S = 60
"""How far the provider's clock may be from ours."""
RELOAD_S = 600.0
"""How long the discovery document and the keys are used before they are fetched again."""
MOST_CALLS = 3
"""Requests that may wait for the provider at a time, so that a slow one holds up nobody else."""
SIGNATURES = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""What an ID token may be signed with: public keys only, whatever the provider lists beside them."""

_NAME = "oidc"
_STATE = f"_state_{_NAME}_"  # as authlib names what it keeps in the session
_TARGET = "oidc-target"
_LONGEST_ISSUER = 160


class ProviderDown(HeraldError):
    """Raised when the OpenID Connect provider cannot be reached, is too slow or answers what is no answer."""

    retriable = True


class LogInRefused(HeraldError):
    """Raised when the provider, or what it says, does not let somebody in; the text is for who wants to log in."""


class Provider:
    """The OpenID Connect provider of the configuration; safe to use from several threads."""

    def __init__(self, config: Config) -> None:
        webui = config.webui
        self.issuer = _issuer(webui.oidc_issuer)
        for setting in ("oidc_client_id", "oidc_client_secret"):
            if not getattr(webui, setting):
                raise ConfigError(f"webui.{setting} is missing: webui.oidc_issuer needs the client that it registered")
        self.claim = webui.oidc_claim
        self.roles = _roles(webui.oidc_roles)
        base = webui.public_url or config.notifier.webui_url
        self._redirect_uri = f"{base.rstrip('/')}/login/oidc/callback"  # never by the Host header
        self._client_id, self._client_secret = webui.oidc_client_id, webui.oidc_client_secret
        self._client: Any = None
        self._loaded_at = 0.0
        self._loading = threading.Lock()
        self._calls = threading.BoundedSemaphore(MOST_CALLS)

    def redirect(self, *, ask_again: bool) -> ResponseReturnValue:
        """To the provider, which asks who it is; raises ProviderDown."""
        prompt = {"prompt": "login"} if ask_again else {}
        with self._asked() as client:
            return cast(ResponseReturnValue, client.authorize_redirect(self._redirect_uri, **prompt))

    def claims(self) -> Mapping[str, Any]:
        """What the ID token says of who comes back with this request; raises LogInRefused or ProviderDown."""
        if not request.args.get("state") or not (request.args.get("code") or request.args.get("error")):
            raise LogInRefused("this is not the way to log in; begin again on the log-in page")
        expected = {
            "iss": {"essential": True, "value": self.issuer},
            "aud": {"essential": True, "value": self._client_id},
            "sub": {"essential": True},
        }
        with self._asked() as client:
            try:
                token = client.authorize_access_token(claims_options=expected, leeway=LEEWAY_S)
            except JoseError as error:
                self._client = None  # its keys may have changed
                log.warning("an ID token of %s was refused: %s", self.issuer, error.error)
                raise LogInRefused(
                    "what the provider said about you could not be verified, and nobody was logged in; tell the "
                    "operator, whose log has the reason"
                ) from error
            except OAuthError as error:
                raise _refusal(error) from error
        claims = token.get("userinfo")
        if not claims or not isinstance(claims["sub"], str):
            log.warning("%s sent no ID token; its client must be one of OpenID Connect", self.issuer)
            raise LogInRefused("the provider did not say who you are; tell the operator")
        return cast(Mapping[str, Any], claims)

    def role(self, claims: Mapping[str, Any]) -> Role | None:
        """The role of the first pair of `webui.oidc_roles` whose value the claim has; None when there is none."""
        said = claims.get(self.claim)
        values = said if isinstance(said, list) else [said]
        return next((role for value, role in self.roles.items() if value in values), None)

    def subject(self, claims: Mapping[str, Any]) -> str:
        """Issuer and subject: what is never given to somebody else, unlike a name (OpenID Connect Core 5.7)."""
        subject = f"{self.issuer} {claims['sub']}"
        if len(subject) <= LONGEST_SUBJECT and subject.isprintable():
            return subject
        return f"{self.issuer} sha256:{sha256(claims['sub'].encode()).hexdigest()}"

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        """The client, loaded; errors of the way to the provider become ProviderDown."""
        if not self._calls.acquire(blocking=False):
            raise ProviderDown(f"{self.issuer} is slow: {MOST_CALLS} requests wait for it already")
        try:
            yield self._loaded()
        except (requests.RequestException, AuthlibBaseError, ValueError, KeyError, TypeError, RuntimeError) as error:
            self._client = None
            # not the text of the error: it may hold an address with a code in it
            raise ProviderDown(f"{self.issuer} cannot be used: {type(error).__name__}") from error
        finally:
            self._calls.release()

    def _loaded(self) -> Any:
        with self._loading:
            if self._client is None or time.monotonic() - self._loaded_at > RELOAD_S:
                self._client = self._discovered()
                self._loaded_at = time.monotonic()
            return self._client

    def _discovered(self) -> Any:
        """A client by the provider's discovery document (OpenID Connect Discovery 4)."""
        url = f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"
        answer = requests.get(url, timeout=TIMEOUT_S)
        answer.raise_for_status()
        found = answer.json()
        if found["issuer"] != self.issuer:
            raise ProviderDown(
                f"webui.oidc_issuer is {self.issuer}, but the provider there calls itself {found['issuer']}; "
                "they must be the same, to the last slash"
            )
        algorithms = [name for name in found["id_token_signing_alg_values_supported"] if name in SIGNATURES]
        if not algorithms:
            raise ProviderDown(f"{self.issuer} signs ID tokens with none of {', '.join(SIGNATURES)}")
        methods = found.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        # some providers put groups into a scope of that name
        more = [self.claim] if self.claim in found.get("scopes_supported", []) else []
        return FlaskOAuth2App(
            FlaskIntegration(_NAME),
            _NAME,
            client_id=self._client_id,
            client_secret=self._client_secret,
            authorize_url=found["authorization_endpoint"],
            access_token_url=found["token_endpoint"],
            client_kwargs={
                "scope": " ".join(dict.fromkeys(["openid", "profile", "email", *more])),
                "code_challenge_method": "S256",
                "token_endpoint_auth_method": "client_secret_basic"
                if "client_secret_basic" in methods
                else "client_secret_post",
                "default_timeout": TIMEOUT_S,
            },
            issuer=self.issuer,
            jwks_uri=found["jwks_uri"],
            id_token_signing_alg_values_supported=algorithms,
        )


def init_app(app: Flask, config: Config) -> None:
    """Make log-in by OpenID Connect part of an application; raises ConfigError that names the wrong setting."""
    app.extensions[EXTENSION] = Provider(config) if config.webui.oidc_issuer else None
    app.register_blueprint(blueprint)


@blueprint.get("")
@public
def start() -> ResponseReturnValue:
    """I choose to log in by my organisation's provider, and am led there."""
    provider = _provider()
    for key in [key for key in session if key.startswith(_STATE)]:
        del session[key]  # the cookie holds one attempt, or it would grow with each
    session[_TARGET] = local(request.args.get("next", ""))
    try:
        return provider.redirect(ask_again=session.get(ASK_AGAIN, False))
    except ProviderDown as error:
        return _down(error)


@blueprint.get("/callback")
@public
def finish() -> ResponseReturnValue:
    """I come back from the provider and am logged in, or told why not and what to ask for."""
    provider, ledger = _provider(), context().ledger
    if refused_too_often(REFUSED):
        reason = "too many log-ins from here were refused; wait five minutes, then try again"
        return _say("Too many tries", reason), 429, RETRY_AFTER
    target = local(session.get(_TARGET, ""))
    try:
        claims = provider.claims()
    except ProviderDown as error:
        return _down(error)
    except LogInRefused as error:
        record.add_audit(ledger, "", address(), REFUSED)
        return _say("You are not logged in", str(error)), 403
    role, subject = provider.role(claims), provider.subject(claims)
    if role is None:
        known = end_sessions(ledger, subject)
        record.add_audit(ledger, known or f"oidc {claims['sub']}", address(), REFUSED)
        return _say("You have no role in Herald", "", provider=provider), 403
    wished = next(v for k in ("preferred_username", "email", "sub") if isinstance(v := claims.get(k), str) and v)
    return begin(admit(ledger, subject, wished, role), target, "log-in-oidc")


def _provider() -> Provider:
    provider: Provider | None = current_app.extensions[EXTENSION]
    if provider is None:
        abort(404)
    return provider


def _refusal(error: Any) -> LogInRefused:
    """What a refusal of the provider means for who wants to log in; its own words may be anybody's."""
    if error.error == "mismatching_state":
        return LogInRefused(
            "this log-in was begun in another window or too long ago, or was used already; begin again on the "
            "log-in page"
        )
    known = error.error if str(error.error).replace("_", "").isalpha() and len(error.error) < 40 else "unknown"
    log.warning("the provider refused a log-in: %s", known)
    if known == "access_denied":
        return LogInRefused("the provider refused: it says that you may not use Herald, or that you cancelled")
    return LogInRefused("the provider refused, and nobody was logged in; begin again on the log-in page")


def _down(error: ProviderDown) -> ResponseReturnValue:
    log.error("log-in by OpenID Connect: %s", error)
    reason = "the provider cannot be reached or does not answer as it should; log in with a password, or try again soon"
    return _say("The provider does not answer", reason), 503, {"Retry-After": "10"}


def _say(title: str, reason: str, provider: Provider | None = None) -> str:
    again = url_for("session.log_in", next=local(session.get(_TARGET, "")) or None)
    return render_template("session/refused.html", title=title, reason=reason, provider=provider, again=again)


def _issuer(issuer: str) -> str:
    try:
        parts = urlsplit(issuer)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), ""
    loopback = host in ("localhost", "127.0.0.1", "::1")
    safe = parts.scheme == "https" or (parts.scheme == "http" and loopback)
    if not (safe and host) or parts.query or parts.fragment or " " in issuer or len(issuer) > _LONGEST_ISSUER:
        raise ConfigError(
            f"webui.oidc_issuer {issuer!r} must be an https:// address without query, as the provider calls itself "
            "(http:// on this host only)"
        )
    return issuer


def _roles(pairs: tuple[str, ...]) -> dict[str, Role]:
    """Role by value of the claim, in the order of the setting."""
    roles: dict[str, Role] = {}
    for pair in pairs:
        value, equals, role = pair.rpartition("=")  # a value may have equals signs, as names of LDAP have
        if not equals or not value.strip() or role.strip() not in ROLES:
            raise ConfigError(
                f"webui.oidc_roles: {pair!r} must be VALUE=ROLE with one of the roles {', '.join(ROLES)}, as in "
                "radiology=reader"
            )
        if value.strip() in roles:
            raise ConfigError(f"webui.oidc_roles: {pair!r} gives a role to {value.strip()!r} a second time")
        roles[value.strip()] = cast(Role, role.strip())
    if not roles:
        raise ConfigError(
            "webui.oidc_roles is empty, so nobody could log in by webui.oidc_issuer; give VALUE=ROLE pairs"
        )
    return roles
