"""Log-in by OpenID Connect against a local provider: real HTTP, real signatures, and everything that may be wrong."""

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from joserfc.jwk import OctKey, RSAKey
from oidc_provider import CLIENT_ID, CLIENT_SECRET, OTHER_KEY, SIGNING_KEY, Provider, running_provider
from sqlalchemy import select
from webui_browser import DESKTOP, open_page
from webui_site import PASSWORD, open_site, served

from herald.config import LedgerConfig
from herald.errors import ConfigError
from herald.ledger import audit, open_ledger, users
from webui import oidc, session
from webui.app import create_app
from webui.users import UserError, add_user, admit, check_password, find_user, remove_user

PUBLIC_URL = "http://herald.hospital.example"
ROLES = ("herald-admins=admin", "ct=reader", "CN=Study,OU=Groups=researcher")


@pytest.fixture
def provider():
    with running_provider() as provider:
        yield provider


@pytest.fixture
def site(tmp_path, provider):
    with open_site(tmp_path, public_url=PUBLIC_URL, **settings(provider)) as site:
        yield site


def settings(provider: Provider, **changes) -> dict:
    return {
        "oidc_issuer": provider.issuer,
        "oidc_client_id": CLIENT_ID,
        "oidc_client_secret": CLIENT_SECRET,
        "oidc_roles": ROLES,
        **changes,
    }


def begin(client, path: str = "/login/oidc") -> dict[str, str]:
    """Go to the provider: what it is asked."""
    answer = client.get(path)
    assert answer.status_code == 302, answer.text
    assert answer.location.partition("?")[0].endswith("/authorize")
    return {key: values[0] for key, values in parse_qs(urlsplit(answer.location).query).items()}


def come_back(client, provider: Provider, asked: dict[str, str]):
    return client.get(provider.allow(asked).removeprefix(PUBLIC_URL))


def log_in(site, provider: Provider, client=None):
    client = client or site.app.test_client()
    return client, come_back(client, provider, begin(client))


def rows(site) -> list[dict]:
    with site.ledger.read() as connection:
        return [dict(row) for row in connection.execute(select(users).order_by(users.c.name)).mappings()]


def audited(site) -> list[tuple[str, str]]:
    with site.ledger.read() as connection:
        return [tuple(row) for row in connection.execute(select(audit.c.user, audit.c.action))]


# --- the way in ------------------------------------------------------------------------------------------------------


def test_somebody_whom_the_provider_knows_is_logged_in_with_the_role_of_the_claim(site, provider):
    client = site.app.test_client()
    asked = begin(client, "/login/oidc?next=/operations")
    assert (asked["response_type"], asked["client_id"]) == ("code", CLIENT_ID)
    assert asked["code_challenge_method"] == "S256"
    assert len(asked["nonce"]) >= 20
    assert len(asked["state"]) >= 20
    assert set(asked["scope"].split()) == {"openid", "profile", "email", "groups"}
    answer = come_back(client, provider, asked)
    assert (answer.status_code, answer.location) == (303, "/operations")
    page = client.get("/").text
    assert "olga" in page
    assert "(reader)" in page
    assert audited(site) == [("olga", "log-in-oidc")]
    (row,) = [row for row in rows(site) if row["subject"]]
    assert (row["name"], row["role"], row["subject"]) == ("olga", "reader", f"{provider.issuer} 0042")


def test_the_way_back_is_the_public_url_whatever_host_was_asked_for(site):
    answer = site.app.test_client().get("/login/oidc", headers={"Host": "evil.example", "X-Forwarded-Host": "evil"})
    (redirect_uri,) = parse_qs(urlsplit(answer.location).query)["redirect_uri"]
    assert redirect_uri == f"{PUBLIC_URL}/login/oidc/callback"


@pytest.mark.parametrize(
    ("said", "role"),
    [
        ("ct", "reader"),
        (["other", "ct"], "reader"),
        (["ct", "herald-admins"], "admin"),  # the first pair of the setting decides
        (["CN=Study,OU=Groups"], "researcher"),
    ],
)
def test_the_claim_is_a_text_or_a_list_and_the_first_pair_that_fits_decides(site, provider, said, role):
    provider.person["groups"] = said
    client, answer = log_in(site, provider)
    assert answer.status_code == 303
    assert f"({role})" in client.get("/").text


@pytest.mark.parametrize("said", [None, [], "", "CT", "ct ", ["CTX"], {"ct": True}, 7, [["ct"]], [None]])
def test_who_has_no_role_is_refused_told_what_to_ask_for_and_audited(site, provider, said):
    provider.person["groups"] = said
    client, answer = log_in(site, provider)
    assert answer.status_code == 403
    for text in ("no role in Herald", "<code>groups</code>", "<code>ct</code> (reader)", "herald-admins"):
        assert text in answer.text
    assert client.get("/").status_code == 302
    assert audited(site) == [("oidc 0042", oidc.REFUSED)]
    assert find_user(site.ledger, "olga") is None


def test_a_role_that_changed_at_the_provider_holds_from_the_next_log_in(site, provider):
    log_in(site, provider)
    provider.person["groups"] = "herald-admins"
    log_in(site, provider)
    assert [row["role"] for row in rows(site) if row["subject"]] == ["admin"]


def test_who_lost_every_role_loses_the_sessions_too_when_the_provider_says_so(site, provider):
    client, _ = log_in(site, provider)
    assert client.get("/").status_code == 200
    provider.person["groups"] = []
    log_in(site, provider)
    assert client.get("/").status_code == 302
    assert audited(site)[-1] == ("olga", oidc.REFUSED)


def test_a_session_by_the_provider_ends_after_its_hours_and_by_log_out(site, provider, monkeypatch):
    client, _ = log_in(site, provider)
    now = time.time()
    monkeypatch.setattr(session.time, "time", lambda: now + 12.1 * 3600)
    assert client.get("/").status_code == 302
    monkeypatch.undo()
    assert client.get("/").status_code == 200
    client.post("/logout")
    assert client.get("/").status_code == 302


def test_after_log_out_the_provider_must_ask_who_it_is(site, provider):
    client, _ = log_in(site, provider)
    client.post("/logout")
    assert begin(client)["prompt"] == "login"
    assert "prompt" not in begin(site.app.test_client())


def test_a_session_ends_when_the_provider_is_no_longer_the_one_of_the_configuration(site, provider):
    client, _ = log_in(site, provider)
    other = replace(site.config, webui=replace(site.config.webui, oidc_issuer=""))
    app = create_app(other, site.ledger, site.store, site.bus)
    cookie = client.get_cookie("herald_session")
    moved = app.test_client()
    moved.set_cookie("herald_session", cookie.value)
    assert moved.get("/").status_code == 302


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rita", "RITA", "ｒｉｔａ", " rita\n"])
def test_the_provider_cannot_take_over_a_local_user_of_the_same_name(site, provider, name):
    provider.person.update(preferred_username=name, groups="herald-admins")
    client, answer = log_in(site, provider)
    assert answer.status_code == 303
    assert find_user(site.ledger, "rita").role == "reader"
    assert find_user(site.ledger, "rita").subject is None
    assert check_password(site.ledger, "rita", PASSWORD) is not None
    (row,) = [row for row in rows(site) if row["subject"]]
    assert row["name"].lower() == "rita (2)"
    assert "(2)" in client.get("/").text


def test_another_person_who_gets_a_name_that_was_given_before_is_another_user(site, provider):
    log_in(site, provider)
    provider.person["sub"] = "0043"
    log_in(site, provider)
    assert [row["name"] for row in rows(site) if row["subject"]] == ["olga", "olga (2)"]


def test_a_person_who_is_renamed_stays_the_same_user(site, provider):
    log_in(site, provider)
    provider.person["preferred_username"] = "olga.new"
    log_in(site, provider)
    assert [row["name"] for row in rows(site) if row["subject"]] == ["olga"]


@pytest.mark.parametrize(
    ("person", "name"),
    [
        ({"preferred_username": None, "email": "olga@hospital.example"}, "olga@hospital.example"),
        ({"preferred_username": ""}, "0042"),
        ({"preferred_username": "o" * 300}, "o" * 54),
        ({"preferred_username": "a\0b\r\nc"}, "a b c"),
        ({"preferred_username": "\r\n"}, "user"),
        ({"preferred_username": ["x"], "email": 7}, "0042"),
    ],
)
def test_a_name_is_found_for_everybody(site, provider, person, name):
    provider.person.update(person)
    _, answer = log_in(site, provider)
    assert answer.status_code == 303
    assert [row["name"] for row in rows(site) if row["subject"]] == [name]


def test_subjects_too_long_for_the_ledger_stay_apart(site, provider):
    for sub in ("s" * 255, "s" * 254 + "t"):
        provider.person["sub"] = sub
        assert log_in(site, provider)[1].status_code == 303
    kept = [row["subject"] for row in rows(site) if row["subject"]]
    assert len(set(kept)) == 2
    assert all(len(subject) <= 256 for subject in kept)


def test_a_user_of_the_provider_has_no_password_and_cannot_be_given_one(site, provider):
    log_in(site, provider)
    (row,) = [row for row in rows(site) if row["subject"]]
    for password in ("", row["password_hash"], row["password_hash"].removeprefix("oidc:"), PASSWORD):
        assert check_password(site.ledger, "olga", password) is None
    answer = site.app.test_client().post("/login", data={"name": "olga", "password": row["password_hash"]})
    assert answer.status_code == 401
    with pytest.raises(UserError, match="olga logs in by OpenID Connect"):
        add_user(site.ledger, "olga", PASSWORD, "admin")
    assert find_user(site.ledger, "olga").role == "reader"


def test_a_session_of_a_removed_user_ends_and_does_not_come_alive_with_the_next_log_in(site, provider):
    first, _ = log_in(site, provider)
    remove_user(site.ledger, "olga")
    assert first.get("/").status_code == 302
    log_in(site, provider)
    assert first.get("/").status_code == 302


def test_two_log_ins_at_once_make_one_user(ledger_url):
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    try:
        gate = threading.Barrier(6)

        def enter(number: int):
            gate.wait(30)
            return admit(ledger, f"https://idp.example {number % 2}", "olga", "reader")

        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(enter, range(6)))
        assert {user.name for user in found} == {"olga", "olga (2)"}
        assert len({(user.subject, user.name) for user in found}) == 2
    finally:
        ledger.close()


# --- what may be wrong -----------------------------------------------------------------------------------------------


def refused(site, client, answer, status: int = 403) -> str:
    """Nobody was logged in, and no user was made."""
    assert answer.status_code == status, answer.text
    assert client.get("/").status_code == 302
    assert all(row["subject"] is None for row in rows(site))
    return answer.text


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": "another"},
        {"nonce": None},
        {"iss": "https://evil.example"},
        {"aud": "another client"},
        {"aud": "another client", "azp": CLIENT_ID},
        {"aud": ["another", "third"]},
        {"aud": []},
        {"aud": [CLIENT_ID, "another"], "azp": "another"},
        {"exp": 1_000_000_000},
        {"iat": 99_999_999_999},
        {"sub": ""},
    ],
    ids=str,
)
def test_an_id_token_with_a_wrong_claim_is_refused(site, provider, changes):
    provider.tamper = lambda claims: {key: v for key, v in {**claims, **changes}.items() if v is not None}
    client, answer = log_in(site, provider)
    assert "could not be verified" in refused(site, client, answer)
    assert audited(site) == [("", oidc.REFUSED)]


@pytest.mark.parametrize("claim", ["iss", "sub", "aud", "exp", "iat", "nonce"])
def test_an_id_token_without_a_required_claim_is_refused(site, provider, claim):
    provider.tamper = lambda claims: {key: value for key, value in claims.items() if key != claim}
    client, answer = log_in(site, provider)
    refused(site, client, answer)


def test_an_id_token_with_a_wrong_signature_is_refused(site, provider):
    provider.signing_key = OTHER_KEY
    client, answer = log_in(site, provider)
    assert "could not be verified" in refused(site, client, answer)


def test_an_id_token_signed_with_what_everybody_can_read_is_refused_even_if_the_provider_lists_it(site, provider):
    shared = OctKey.import_key("a key that the provider publishes", {"kid": "shared", "use": "sig", "alg": "HS256"})
    provider.published_keys = [SIGNING_KEY, shared]
    provider.signing_key, provider.header = shared, {"alg": "HS256", "kid": "shared"}
    client, answer = log_in(site, provider)
    refused(site, client, answer)


def test_a_new_key_of_the_provider_is_fetched(site, provider):
    assert log_in(site, provider)[1].status_code == 303
    key = RSAKey.generate_key(2048, {"kid": "second", "use": "sig", "alg": "RS256"})
    provider.signing_key, provider.header = key, {"alg": "RS256", "kid": "second"}
    provider.published_keys = [key]
    assert log_in(site, provider)[1].status_code == 303


def test_a_new_key_under_the_old_name_is_found_at_the_second_try(site, provider):
    assert log_in(site, provider)[1].status_code == 303
    provider.signing_key, provider.published_keys = OTHER_KEY, [OTHER_KEY]
    assert log_in(site, provider)[1].status_code == 403
    assert log_in(site, provider)[1].status_code == 303


def test_an_answer_without_an_id_token_is_refused(site, provider):
    provider.with_id_token = False
    client, answer = log_in(site, provider)
    assert "did not say who you are" in refused(site, client, answer)


def test_an_answer_to_nobodys_question_is_refused(site, provider):
    asked = begin(site.app.test_client())
    victim = site.app.test_client()  # an attacker sends somebody the end of their own log-in
    text = refused(site, victim, come_back(victim, provider, asked))
    assert "begun in another window" in text
    begin(victim)
    refused(site, victim, come_back(victim, provider, asked))


@pytest.mark.parametrize("query", ["", "?code=x", "?state=x", "?code=&state=", "?error=access_denied"])
def test_a_callback_that_lacks_something_is_refused(site, query):
    client = site.app.test_client()
    begin(client)
    refused(site, client, client.get(f"/login/oidc/callback{query}"))


def test_a_code_is_good_once(site, provider):
    client = site.app.test_client()
    asked = begin(client)
    before = client.get_cookie("herald_session").value
    callback = provider.allow(asked).removeprefix(PUBLIC_URL)
    assert client.get(callback).status_code == 303
    assert client.get(callback).status_code == 403  # our session has forgotten the state ...
    thief = site.app.test_client()
    thief.set_cookie("herald_session", before)
    assert thief.get(callback).status_code == 403  # ... and with an old one the provider refuses the code
    assert provider.refused == ["invalid_grant"]
    assert thief.get("/").status_code == 302


def test_a_code_of_another_log_in_is_refused_by_its_challenge(site, provider):
    """PKCE: a code that was caught on its way is of no use in another browser."""
    caught = provider.allow(begin(site.app.test_client()))
    client = site.app.test_client()
    own = begin(client)
    code = parse_qs(urlsplit(caught).query)["code"][0]
    answer = client.get(f"/login/oidc/callback?code={code}&state={own['state']}")
    refused(site, client, answer)
    assert provider.refused == ["invalid_grant"]


def test_a_wrong_client_secret_is_refused_in_words_without_the_words_of_others(tmp_path, provider):
    with open_site(tmp_path, public_url=PUBLIC_URL, **settings(provider, oidc_client_secret="wrong")) as site:
        client, answer = log_in(site, provider)
        text = refused(site, client, answer)
        assert provider.refused == ["invalid_client"]
        assert "words of the provider" not in text


def test_words_in_the_address_never_come_onto_the_page_or_into_the_log(site, caplog):
    client = site.app.test_client()
    state = begin(client)["state"]
    forged = "error=<script>Call+555&error_description=Your+account+is+locked"
    answer = client.get(f"/login/oidc/callback?state={state}&{forged}")
    text = refused(site, client, answer) + caplog.text
    for word in ("555", "script>Call", "locked"):
        assert word not in text


def test_who_cancels_at_the_provider_is_told_so(site):
    client = site.app.test_client()
    state = begin(client)["state"]
    assert "you cancelled" in refused(
        site, client, client.get(f"/login/oidc/callback?state={state}&error=access_denied")
    )


def test_a_log_in_by_the_provider_never_leads_to_another_site(site, provider):
    client = site.app.test_client()
    asked = begin(client, "/login/oidc?next=//elsewhere.example")
    assert come_back(client, provider, asked).location == "/"


def test_a_session_that_somebody_else_prepared_is_not_carried_on(site, provider):
    client = site.app.test_client()
    with client.session_transaction() as prepared:
        prepared["planted"] = "by somebody"
    log_in(site, provider, client)
    with client.session_transaction() as after:
        assert "planted" not in after
        assert not [key for key in after if key.startswith("_state_")]


def test_many_log_ins_that_were_begun_do_not_fill_the_cookie(site):
    client = site.app.test_client()
    begin(client)
    first = len(client.get_cookie("herald_session").value)
    for _ in range(20):
        begin(client)
    assert len(client.get_cookie("herald_session").value) < first + 50


def test_after_many_refusals_an_address_must_wait(site, provider, monkeypatch):
    monkeypatch.setattr(session, "MOST_FAILURES_AT_ADDRESS", 3)
    for _ in range(3):
        assert site.app.test_client().get("/login/oidc/callback?code=x&state=x").status_code == 403
    client, answer = log_in(site, provider)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "300")
    assert len(audited(site)) == 3  # and fills the table no further
    assert client.get("/").status_code == 302
    assert site.client("rita").get("/").status_code == 200  # passwords have a count of their own


# --- a provider in trouble -------------------------------------------------------------------------------------------


def test_without_the_provider_a_page_says_so_and_passwords_go_on_working(tmp_path, caplog):
    with running_provider() as gone:
        pass
    with open_site(tmp_path, public_url=PUBLIC_URL, **settings(gone)) as site:
        client = site.app.test_client()
        answer = client.get("/login/oidc?next=/operations")
        assert answer.status_code == 503
        assert "log in with a password, or try again" in answer.text
        assert 'href="/login?next=/operations"' in answer.text
        assert "Traceback" not in answer.text
        assert gone.issuer in caplog.text
        assert client.post("/login", data={"name": "rita", "password": PASSWORD}).status_code == 303
        assert client.get("/").status_code == 200


@pytest.mark.parametrize("failing", ["/.well-known/openid-configuration", "/token", "/jwks"])
def test_a_provider_that_fails_halfway_is_said_and_works_when_it_is_back(site, provider, failing):
    provider.failing = failing
    client = site.app.test_client()
    answer = client.get("/login/oidc")
    if answer.status_code == 302:
        answer = come_back(client, provider, begin(client))
    assert answer.status_code == 503
    assert client.get("/").status_code == 302
    provider.failing = ""
    assert log_in(site, provider)[1].status_code == 303


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"issuer": "http://127.0.0.1:1/"}, "they must be the same, to the last slash"),
        ({"id_token_signing_alg_values_supported": ["none", "HS256"]}, "signs ID tokens with none of"),
        ({"jwks_uri": None}, "cannot be used"),
        ({"id_token_signing_alg_values_supported": 7}, "cannot be used"),
    ],
)
def test_a_discovery_document_that_cannot_be_right_is_refused_and_the_log_says_why(
    site, provider, document, reason, caplog
):
    provider.discovery = document
    client = site.app.test_client()
    answer = client.get("/login/oidc")
    if answer.status_code == 302:
        answer = come_back(client, provider, begin(client))
    assert answer.status_code == 503
    assert reason in caplog.text


def test_a_discovery_document_cannot_switch_off_the_checks(site, provider):
    provider.discovery = {
        "verify": False,
        "scope": "everything",
        "code_challenge_method": "plain",
        "jwks": {"keys": []},
    }
    client = site.app.test_client()
    asked = begin(client)
    assert asked["code_challenge_method"] == "S256"
    assert "everything" not in asked["scope"]
    assert come_back(client, provider, asked).status_code == 303


def test_a_provider_that_does_not_answer_holds_up_few_and_nobody_who_has_a_password(site, provider, monkeypatch):
    provider.hold = threading.Event()
    clients = [site.app.test_client() for _ in range(oidc.MOST_CALLS)]
    callbacks = [provider.allow(begin(client)).removeprefix(PUBLIC_URL) for client in clients]
    with ThreadPoolExecutor(oidc.MOST_CALLS) as threads:
        waiting = [threads.submit(client.get, path) for client, path in zip(clients, callbacks, strict=True)]
        for _ in clients:
            assert provider.waiting.acquire(timeout=30)
        started = time.monotonic()
        assert site.app.test_client().get("/login/oidc").status_code == 503
        assert site.client("rita").get("/").status_code == 200
        assert time.monotonic() - started < oidc.TIMEOUT_S
        provider.hold.set()
        assert [answer.result().status_code for answer in waiting] == [303] * oidc.MOST_CALLS
    assert log_in(site, provider)[1].status_code == 303  # every place was given back


def test_a_provider_that_is_too_slow_is_given_up(tmp_path, provider, monkeypatch):
    monkeypatch.setattr(oidc, "TIMEOUT_S", 0.2)
    with open_site(tmp_path, public_url=PUBLIC_URL, **settings(provider)) as site:
        client = site.app.test_client()
        asked = begin(client)
        provider.hold = threading.Event()
        assert come_back(client, provider, asked).status_code == 503
        provider.hold.set()


# --- settings, page, log ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"oidc_issuer": "http://login.hospital.example"}, "must be an https:// address"),
        ({"oidc_issuer": "http://127.evil.example"}, "must be an https:// address"),
        ({"oidc_issuer": "login.hospital.example"}, "'login.hospital.example' must be"),
        ({"oidc_issuer": "https://[login"}, "must be an https:// address"),
        ({"oidc_issuer": "https://login.example/?x=1"}, "without query"),
        ({"oidc_client_id": ""}, "webui.oidc_client_id is missing"),
        ({"oidc_client_secret": ""}, "webui.oidc_client_secret is missing"),
        ({"oidc_roles": ()}, "webui.oidc_roles is empty"),
        ({"oidc_roles": ("ct=reader", "mr=surgeon")}, "'mr=surgeon' must be VALUE=ROLE .* reader, researcher, admin"),
        ({"oidc_roles": ("ct",)}, "'ct' must be VALUE=ROLE"),
        ({"oidc_roles": ("=reader",)}, "'=reader' must be VALUE=ROLE"),
        ({"oidc_roles": ("ct=reader", "ct = admin")}, "'ct = admin' gives a role to 'ct' a second time"),
    ],
    ids=str,
)
def test_a_wrong_setting_stops_the_start_and_is_named(tmp_path, changes, reason):
    given = {"oidc_issuer": "https://login.example", **settings(Provider(issuer="https://login.example")), **changes}
    with pytest.raises(ConfigError, match=reason), open_site(tmp_path, **given):
        pass


def test_the_log_in_page_offers_the_provider_only_where_there_is_one(site, tmp_path):
    page = site.app.test_client().get("/login?next=/operations").text
    assert "Log in with 127.0.0.1" in page
    assert 'href="/login/oidc?next=/operations"' in page
    (tmp_path / "without").mkdir()
    with open_site(tmp_path / "without") as without:
        client = without.app.test_client()
        assert "Log in with" not in client.get("/login").text
        assert client.get("/login/oidc").status_code == 404
        assert client.get("/login/oidc/callback").status_code == 404


def test_neither_codes_nor_tokens_nor_verifiers_nor_names_are_logged(site, provider, caplog):
    caplog.set_level(logging.DEBUG)
    client = site.app.test_client()
    asked = begin(client)
    with client.session_transaction() as kept:
        (state,) = [value["data"] for key, value in kept.items() if key.startswith("_state_")]
    callback = provider.allow(asked)
    assert client.get(callback.removeprefix(PUBLIC_URL)).status_code == 303
    provider.tamper = lambda claims: {**claims, "exp": 1}
    log_in(site, provider)
    code = parse_qs(urlsplit(callback).query)["code"][0]
    for secret in (code, asked["nonce"], asked["state"], state["code_verifier"], CLIENT_SECRET, "olga", "0042"):
        assert secret not in caplog.text


def test_the_provider_of_these_tests_refuses_what_a_real_one_refuses(provider):
    """So that the tests above could fail."""
    token = f"{provider.issuer}/token"
    given = {"grant_type": "authorization_code", "code": "x", "code_verifier": "y"}
    assert requests.post(token, data=given, timeout=30).json()["error"] == "invalid_client"
    answer = requests.post(token, data=given, auth=(CLIENT_ID, CLIENT_SECRET), timeout=30)
    assert answer.json()["error"] == "invalid_grant"
    (key,) = requests.get(f"{provider.issuer}/jwks", timeout=30).json()["keys"]
    assert "d" not in key
    assert key["kid"] == SIGNING_KEY.kid


def test_a_reader_logs_in_by_the_provider_in_a_browser_looks_and_logs_out(chromium, tmp_path, provider):
    pictures = Path(os.environ.get("HERALD_TEST_SCREENSHOTS", tmp_path / "screenshots"))
    pictures.mkdir(parents=True, exist_ok=True)
    with open_site(tmp_path, **settings(provider)) as site, served(site) as running:
        event = site.add(1)
        page = open_page(chromium, running, DESKTOP, f"/?search={event.accession_number}")
        page.screenshot(path=pictures / "oidc-log-in.png")
        page.get_by_role("link", name="Log in with 127.0.0.1").click()
        page.get_by_role("button", name="Allow").click()
        page.wait_for_url("**/?search=*")  # where the reader wanted to go
        page.get_by_text("olga").wait_for()
        page.get_by_role("link", name=event.accession_number).click()
        page.wait_for_url("**/series/**")
        page.get_by_role("button", name="Log out").click()
        page.get_by_text("You are logged out.").wait_for()
        assert page.complaints == []
        provider.person["groups"] = ["another"]
        page.get_by_role("link", name="Log in with 127.0.0.1").click()
        page.get_by_role("button", name="Allow").click()
        page.get_by_role("heading", name="You have no role in Herald").wait_for()
        assert provider.asked[-1]["prompt"] == "login"
        page.screenshot(path=pictures / "oidc-no-role.png")
        page.get_by_role("link", name="To the log-in page").click()
        provider.failing = "/token"
        page.get_by_role("link", name="Log in with 127.0.0.1").click()
        page.get_by_role("button", name="Allow").click()
        page.get_by_role("heading", name="The provider does not answer").wait_for()
        page.screenshot(path=pictures / "oidc-down.png")
