"""Log-in, log-out, and who may see what: every view needs a log-in unless it says otherwise."""

import hmac
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

from flask import (
    Blueprint,
    Flask,
    abort,
    current_app,
    flash,
    make_response,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.typing import ResponseReturnValue
from flask_login import LoginManager, current_user, login_user, logout_user  # type: ignore[import-untyped]

from herald.config import required_secret
from webui import record
from webui.context import context
from webui.users import Role, User, check_password, find_user

blueprint = Blueprint("session", __name__)

LOG_IN_FAILED = "log-in-failed"
FAILURES_WITHIN = timedelta(minutes=5)
RETRY_AFTER = {"Retry-After": str(int(FAILURES_WITHIN.total_seconds()))}
MOST_FAILURES_OF_USER_AT_ADDRESS = 5
MOST_FAILURES_AT_ADDRESS = 30
MOST_FAILURES_OF_USER = 50

ASK_AGAIN = "ask-again"
"""Key of a session in which the provider must ask who it is."""
_UNTIL = "until"

View = TypeVar("View", bound=Callable[..., ResponseReturnValue])

_public: set[object] = set()
_allowed: dict[object, tuple[Role, ...]] = {}


def public(view: View) -> View:
    """Mark a view that needs no log-in."""
    _public.add(view)
    return view


def allow(*roles: Role) -> Callable[[View], View]:
    """Mark a view that only these roles may use."""

    def mark(view: View) -> View:
        _allowed[view] = roles
        return view

    return mark


def user() -> User:
    """Who is logged in; only for views that need a log-in."""
    who: User = current_user._get_current_object()
    return who


def address() -> str:
    """Where the request comes from."""
    return request.remote_addr or ""


def init_app(app: Flask) -> None:
    """Make log-in part of an application."""
    # without Flask-Login's own context processor, an error page needs no look into the ledger
    manager = LoginManager(app, add_context_processor=False)
    manager.session_protection = "basic"
    manager.user_loader(_load_user)
    app.before_request(_require_log_in)
    app.register_blueprint(blueprint)


def is_still_open() -> bool:
    """Whether the session of this request is still good, for an answer that goes on for minutes."""
    return _load_user(user().get_id()) is not None


def _load_user(user_id: str) -> User | None:
    """The user of this session unless it ran out, the password changed or the user or its provider is gone."""
    if session.get(_UNTIL, 0.0) < time.time():
        return None
    _, _, name = user_id.partition(":")
    found = find_user(context().ledger, name)
    if found is None or found.get_id() != user_id:
        return None
    issuer = context().config.webui.oidc_issuer
    return found if found.subject is None or (issuer and found.subject.startswith(f"{issuer} ")) else None


def _require_log_in() -> ResponseReturnValue | None:
    if request.endpoint is None or request.endpoint == "static":
        return None
    view = current_app.view_functions[request.endpoint]
    if view in _public:
        return None
    if not current_user.is_authenticated:
        if request.method in ("GET", "HEAD"):
            return redirect(url_for("session.log_in", next=request.full_path.rstrip("?")))
        abort(401)
    if view in _allowed and user().role not in _allowed[view]:
        abort(403)
    return None


@blueprint.get("/login")
@public
def log_in() -> ResponseReturnValue:
    """I give my name and password."""
    return _log_in_page(local(request.args.get("next", "")))


@blueprint.post("/login")
@public
def open_session() -> ResponseReturnValue:
    """I log in and come to where I wanted to go."""
    name, password = request.form.get("name", "").strip(), request.form.get("password", "")
    target = local(request.form.get("next", ""))
    ledger = context().ledger
    noted = name if find_user(ledger, name) is not None else _mark(name)
    if _too_many_failures(noted):
        return _log_in_page(target, name, "too many"), 429, RETRY_AFTER
    who = check_password(ledger, name, password)
    if who is None:
        record.add_audit(ledger, noted, address(), LOG_IN_FAILED)
        return _log_in_page(target, name, "wrong"), 401
    return begin(who, target, "log-in")


def begin(who: User, target: str, action: str) -> ResponseReturnValue:
    """Begin the session of somebody who has shown who they are, and lead to where they wanted to go."""
    session.clear()  # a session that somebody else prepared is not carried on
    session.permanent = True
    session[_UNTIL] = time.time() + context().config.webui.session_hours * 3600
    login_user(who)
    record.add_audit(context().ledger, who.name, address(), action)
    return redirect(target or url_for("worklist.index"), 303)


@blueprint.post("/logout")
def log_out() -> ResponseReturnValue:
    """I log out; pictures leave the browser's cache."""
    who = user()
    record.add_audit(context().ledger, who.name, address(), "log-out")
    logout_user()
    session.clear()
    if who.subject:  # or the next at this screen would be let in by the provider as who has just left
        session[ASK_AGAIN] = True
    flash("You are logged out.")
    response = make_response(redirect(url_for("session.log_in"), 303))
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


def _log_in_page(target: str, name: str = "", problem: str = "") -> str:
    provider = urlsplit(context().config.webui.oidc_issuer).hostname
    return render_template("session/log_in.html", next=target, name=name, problem=problem, provider=provider)


def refused_too_often(action: str) -> bool:
    """Whether so many requests of this address were refused lately, and noted as `action`, that it must wait."""
    noted = record.count_audit(context().ledger, action, FAILURES_WITHIN, address=address())
    return noted >= MOST_FAILURES_AT_ADDRESS


def _mark(name: str) -> str:
    """Stands in the audit for a name that nobody has: it is counted like any other, or the count would tell who exists.

    What was typed may be a password, so that eight digits of a keyed hash are all that is written down.
    """
    key = required_secret(context().config.webui.secret_key, "webui.secret_key").encode()
    return f"nobody {hmac.digest(key, b'herald.name' + name.encode(), 'sha256').hex()[:8]}"


def _too_many_failures(name: str) -> bool:
    if refused_too_often(LOG_IN_FAILED):
        return True

    def failures(at: str | None) -> int:
        return record.count_audit(context().ledger, LOG_IN_FAILED, FAILURES_WITHIN, user=name, address=at)

    return failures(address()) >= MOST_FAILURES_OF_USER_AT_ADDRESS or failures(None) >= MOST_FAILURES_OF_USER


def local(target: str) -> str:
    """A path of this site, or nothing: a link must not lead from our log-in to somebody else's site."""
    if not target.startswith("/") or target.startswith("//") or "\\" in target or not target.isprintable():
        return ""  # browsers take a backslash for a slash, and drop tabs and line ends
    return target
