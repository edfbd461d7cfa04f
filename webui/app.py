"""The web UI as a Flask application: its parts, its safety headers, and its errors in words."""

import logging
from datetime import timedelta
from functools import partial
from http import HTTPStatus

from flask import Flask, Response, current_app, jsonify, render_template, request
from flask.typing import ResponseReturnValue
from flask_login import current_user  # type: ignore[import-untyped]
from flask_wtf.csrf import CSRFError, CSRFProtect  # type: ignore[import-untyped]
from werkzeug.exceptions import HTTPException

import herald
from herald.bus import Bus
from herald.config import Config, required_secret
from herald.errors import LedgerError, LinkError, StoreError
from herald.ledger import Ledger
from herald.store import StudyStore
from webui import (
    adjudication,
    api,
    audit,
    oidc,
    operations,
    page,
    proxy,
    record,
    series,
    session,
    validation,
    viewer,
    words,
    worklist,
)
from webui.context import EXTENSION, Context
from webui.live import Live
from webui.picture import Pictures
from webui.publisher import ReviewPublisher

log = logging.getLogger(__name__)

LARGEST_REQUEST_BYTES = 1 << 20

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src 'self'",
        "style-src 'self'",
        "script-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)

PERMISSIONS_POLICY = ", ".join(
    f"{feature}=()"
    for feature in ("camera", "display-capture", "geolocation", "hid", "microphone", "midi", "payment", "serial", "usb")
)

ERRORS = {
    400: ("The request was not understood", "Go back, reload the page and try again."),
    401: ("You are not logged in", "Log in and try again."),
    403: (
        "You may not do this",
        "Your role does not allow it, or the prediction is hidden until you have given your verdict. "
        "An administrator can change roles with `herald user add`.",
    ),
    404: ("There is nothing here", "The series, revision or page is unknown; look for it in the worklist."),
    405: ("This address does not work that way", "Go back to the worklist."),
    413: ("The request is too large", "Shorten what you send."),
    429: ("Too many tries", "Wait a few minutes."),
    500: ("Something went wrong on our side", "The error is in the log of the web UI; tell the operator the time."),
}
LEDGER_DOWN = (
    "The ledger cannot be reached",
    "Nothing was saved. Try again in a minute. Operator: check that the database of `ledger.url` runs; "
    "the reason is in the log of the web UI.",
)
STORE_DOWN = (
    "The study store cannot be read",
    "Try again in a minute. Operator: check the disk of `store.root`; the reason is in the log of the web UI.",
)


def create_app(config: Config, ledger: Ledger, store: StudyStore, bus: Bus) -> Flask:
    """The application; connects to nothing by itself, raises ConfigError when a secret is missing.

    Reviews reach the bus through the publisher in `app.extensions["herald"]`, which `webui.service` runs.
    """
    required_secret(config.webui.token, "webui.token")
    app = Flask(__name__)
    https = config.webui.public_url.startswith("https://")
    app.config.update(
        SECRET_KEY=required_secret(config.webui.secret_key, "webui.secret_key"),
        MAX_CONTENT_LENGTH=LARGEST_REQUEST_BYTES,
        PERMANENT_SESSION_LIFETIME=timedelta(hours=config.webui.session_hours),
        SESSION_REFRESH_EACH_REQUEST=False,
        # the prefix: no neighbour in the domain can set it (RFC 6265bis 4.1.3)
        SESSION_COOKIE_NAME="__Host-herald_session" if https else "herald_session",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=https,
        WTF_CSRF_TIME_LIMIT=None,  # as long as the session: pages stay open for hours in a reading room
    )
    live = Live(partial(record.worklist_version, ledger))
    live.init_app(app)
    app.extensions[EXTENSION] = Context(config, ledger, store, Pictures(store), ReviewPublisher(ledger, bus), live)
    protect = CSRFProtect(app)
    protect.exempt(api.blueprint)
    protect.exempt(page.acknowledge)  # nobody can forge it: its address holds the signed token, cookies or not
    proxy.init_app(app, config.webui.trusted_proxies)
    session.init_app(app)
    audit.init_app(app)
    oidc.init_app(app, config)
    for part in (api, worklist, series, viewer, page, operations, validation, adjudication):
        app.register_blueprint(part.blueprint)
    _add_words(app, config)
    _add_errors(app)
    app.after_request(_secure)
    return app


def _add_words(app: Flask, config: Config) -> None:
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.globals.update(
        current_user=current_user,
        words=words,
        shadow=config.notifier.mode == "shadow",
        software_version=herald.__version__,
    )
    app.jinja_env.filters.update(percent=words.percent, ago=words.ago, clock=words.clock, duration=words.duration)


def _add_errors(app: Flask) -> None:
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(CSRFError, _expired_form)
    app.register_error_handler(LinkError, _bad_link)
    app.register_error_handler(LedgerError, _ledger_down)
    app.register_error_handler(StoreError, _store_down)
    app.register_error_handler(record.ResultChanged, _changed)


def _http_error(error: HTTPException) -> ResponseReturnValue:
    code = error.code or 500
    if code < 400:  # a redirect that routing raised
        return error.get_response()
    usual = (HTTPStatus(code).phrase, "Go back to the worklist.")
    return _say(code, *ERRORS.get(code, usual))


def _expired_form(error: CSRFError) -> ResponseReturnValue:
    log.info("a form was refused: %s", error.description)
    return _say(400, "This form has expired", "Nothing was saved. Go back, reload the page and send it again.")


def _bad_link(error: LinkError) -> ResponseReturnValue:
    text = str(error)
    return _say(403, "This link cannot be used", text[:1].upper() + text[1:] + ".")


def _changed(error: record.ResultChanged) -> ResponseReturnValue:
    return _say(409, "The result has changed", str(error))


def _ledger_down(error: LedgerError) -> ResponseReturnValue:
    log.error("%s", error)
    return _say(503, *LEDGER_DOWN)


def _store_down(error: StoreError) -> ResponseReturnValue:
    log.error("%s", error)
    return _say(503, *STORE_DOWN)


def _say(code: int, title: str, advice: str) -> ResponseReturnValue:
    """An error page that needs neither ledger nor session; JSON for programs."""
    headers = {"Retry-After": "10"} if code == 503 else {}
    if request.path.startswith("/api/"):
        return jsonify(error=f"{title}. {advice}"), code, headers
    return render_template("error.html", code=code, title=title, advice=advice), code, headers


def _secure(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    # the address of a link page is a secret: not even our own pages are told it
    response.headers["Referrer-Policy"] = "no-referrer" if request.blueprint == "page" else "same-origin"
    response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["Permissions-Policy"] = PERMISSIONS_POLICY
    if request.endpoint != "static" and "Cache-Control" not in response.headers:
        response.headers["Cache-Control"] = "no-store"
    if current_app.config["SESSION_COOKIE_SECURE"]:  # TLS may end at a proxy before us
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
    return response
