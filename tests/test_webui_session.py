import logging
import re
from urllib.parse import urljoin, urlsplit

import pytest
import requests
from flask import redirect
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import select
from webui_site import PASSWORD, open_site, served, triaged

from herald.config import LedgerConfig
from herald.errors import ConfigError
from herald.ledger import audit, open_ledger, users
from webui import page, proxy, session
from webui.users import UserError, add_user, check_password, find_user


def audited(site) -> list[tuple[str, str]]:
    with site.ledger.read() as connection:
        rows = connection.execute(select(audit.c.user, audit.c.action))
        return [(re.sub("^nobody [0-9a-f]{8}$", "nobody …", user), action) for user, action in rows]


def test_a_log_in_leads_to_where_the_reader_wanted_to_go(site):
    client = site.app.test_client()
    wanted = client.get("/?disposition=positive").location
    assert wanted.startswith("/login?next=")
    answer = client.post("/login", data={"name": "rita", "password": PASSWORD, "next": "/?disposition=positive"})
    assert answer.location == "/?disposition=positive"


@pytest.mark.parametrize(
    "target", ["https://elsewhere.example/", "//elsewhere.example", "/\\elsewhere.example", "x", "/\tx"]
)
def test_a_log_in_never_leads_to_another_site(site, target):
    answer = site.app.test_client().post("/login", data={"name": "rita", "password": PASSWORD, "next": target})
    assert answer.location == "/"


@pytest.mark.parametrize("target", ["//[", "http://[", "/[", "/\u2028", "/" + "a" * 5000, "/%5c%5celsewhere.example"])
def test_a_target_that_is_no_address_at_all_stops_nobody(site, target):
    assert site.app.test_client().get("/login", query_string={"next": target}).status_code == 200
    answer = site.app.test_client().post("/login", data={"name": "rita", "password": PASSWORD, "next": target})
    assert answer.status_code == 303
    assert urlsplit(urljoin("http://herald.example/login", answer.location)).netloc == "herald.example"


TRICKS = st.sampled_from(
    [*"/\\:@?#[]%.;&=\t\r\n\0 ", "//", "evil.example", "http:", "javascript:", "%2f", "%5c", "．", "／"]
)


@given(st.lists(st.one_of(TRICKS, st.characters()), max_size=8).map("".join))
@example("/\t/evil.example")
@example("///evil.example")
@example("/\\/evil.example")
@example("/.//evil.example")
def test_whatever_a_target_is_a_browser_stays_on_our_site(target):
    found = session.local(target)
    assert found in (target, "")
    if found:
        location = redirect(found).location
        # what the URL standard does to what a server sends: tabs and line ends vanish, backslashes are slashes
        seen = re.sub(r"[\t\r\n]", "", location).strip("".join(map(chr, range(33)))).replace("\\", "/")
        assert seen.startswith("/")
        assert not seen.startswith("//")


@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("rita", "wrong"),
        ("nobody", PASSWORD),
        ("", ""),
        ("RITA", PASSWORD),
        ("rita\0", PASSWORD),
        ("r" * 999, PASSWORD),
    ],
)
def test_a_wrong_name_and_a_wrong_password_get_the_same_answer(site, name, password):
    client = site.app.test_client()
    answer = client.post("/login", data={"name": name, "password": password})
    assert answer.status_code == 401
    assert "Name or password is wrong." in answer.text
    assert client.get("/").status_code == 302


def test_log_ins_failures_and_log_outs_are_audited_without_what_was_typed(site):
    client = site.client("rita")
    client.post("/logout")
    client.post("/login", data={"name": "rita", "password": "wrong"})
    client.post("/login", data={"name": "my secret password", "password": "wrong"})
    assert audited(site) == [
        ("rita", "log-in"),
        ("rita", "log-out"),
        ("rita", session.LOG_IN_FAILED),
        ("nobody …", session.LOG_IN_FAILED),
    ]


def test_after_five_wrong_passwords_even_the_right_one_must_wait(site):
    client = site.app.test_client()
    for _ in range(session.MOST_FAILURES_OF_USER_AT_ADDRESS):
        assert client.post("/login", data={"name": "rita", "password": "wrong"}).status_code == 401
    answer = client.post("/login", data={"name": "rita", "password": PASSWORD})
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "300"
    assert site.client("ada").get("/").status_code == 200  # another user is not locked out
    elsewhere = {"REMOTE_ADDR": "192.0.2.7"}
    answer = client.post("/login", data={"name": "rita", "password": PASSWORD}, environ_overrides=elsewhere)
    assert answer.status_code == 303  # nor is the same user from elsewhere


def test_how_often_one_may_try_does_not_tell_which_names_exist(site):
    def answers(name: str) -> list[int]:
        client = site.app.test_client()
        return [client.post("/login", data={"name": name, "password": "wrong"}).status_code for _ in range(7)]

    assert answers("rita") == answers("nobody at all") == [401] * 5 + [429] * 2
    assert answers("another") == [401] * 5 + [429] * 2  # and nobody waits for another's tries


def test_after_many_failures_an_address_must_wait_whatever_the_name(site, monkeypatch):
    monkeypatch.setattr(session, "MOST_FAILURES_AT_ADDRESS", 2)
    client = site.app.test_client()
    for name in ("one", "two"):
        client.post("/login", data={"name": name, "password": "wrong"})
    assert client.post("/login", data={"name": "rita", "password": PASSWORD}).status_code == 429


def test_a_logged_out_session_is_over(site):
    client = site.client("rita")
    answer = client.post("/logout")
    assert answer.headers["Clear-Site-Data"] == '"cache"'
    assert client.get("/").status_code == 302


def test_a_session_ends_after_its_hours_even_in_use(site, monkeypatch):
    import time

    client = site.client("rita")
    now = time.time()
    monkeypatch.setattr(session.time, "time", lambda: now + 11.9 * 3600)
    assert client.get("/").status_code == 200
    monkeypatch.setattr(session.time, "time", lambda: now + 12.1 * 3600)
    assert client.get("/").status_code == 302


def test_a_new_password_or_a_removed_user_ends_every_session(site):
    rita, remi = site.client("rita"), site.client("remi")
    add_user(site.ledger, "rita", "another password", "reader")
    with site.ledger.begin() as connection:
        connection.execute(users.delete().where(users.c.name == "remi"))
    assert rita.get("/").status_code == 302
    assert remi.get("/").status_code == 302


@pytest.mark.parametrize(("url", "secure"), [("https://herald.example", True), ("http://127.0.0.1:8080", False)])
def test_the_session_cookie_is_out_of_reach_of_scripts_and_other_sites(tmp_path, url, secure):
    with open_site(tmp_path, public_url=url) as site:
        answer = site.app.test_client().post("/login", data={"name": "rita", "password": PASSWORD})
        cookie = answer.headers["Set-Cookie"]
        assert ("Strict-Transport-Security" in answer.headers) == secure
        assert cookie.startswith("__Host-") == secure
        assert "Path=/" in cookie
        assert "Domain=" not in cookie
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        assert ("Secure" in cookie) == secure


def test_passwords_are_kept_as_argon2_hashes_only(site):
    with site.ledger.read() as connection:
        hashes = connection.execute(select(users.c.password_hash)).scalars().all()
    assert all(value.startswith("$argon2id$") and PASSWORD not in value for value in hashes)


def test_adding_a_known_user_changes_password_and_role(site):
    add_user(site.ledger, "rita", "another password", "admin")
    assert check_password(site.ledger, "rita", PASSWORD) is None
    assert check_password(site.ledger, "rita", "another password").role == "admin"


@pytest.mark.parametrize(
    ("name", "password", "role", "reason"),
    [
        ("", PASSWORD, "reader", "1 to 64 printable"),
        (" rita", PASSWORD, "reader", "without blanks"),
        ("new", PASSWORD, "surgeon", "reader, researcher, admin"),
        ("new", "short", "reader", "10 characters or more"),
    ],
)
def test_a_user_that_cannot_be_is_refused_with_the_reason(site, name, password, role, reason):
    with pytest.raises(UserError, match=reason):
        add_user(site.ledger, name, password, role)
    assert find_user(site.ledger, "new") is None


def test_a_name_that_no_database_takes_is_nobody(ledger_url):
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    try:
        assert find_user(ledger, "rita\0") is None
        assert check_password(ledger, "rita\0", PASSWORD) is None
    finally:
        ledger.close()


# --- links of pages --------------------------------------------------------------------------------------------------


def test_who_tries_many_links_must_wait_but_a_link_that_holds_is_followed_all_the_same(site, monkeypatch):
    """A hospital's phones may share one address, and what must not wait is an acknowledgement."""
    monkeypatch.setattr(session, "MOST_FAILURES_AT_ADDRESS", 3)
    good = site.link(site.add(1))
    guesses = ["/page/" + letter * 32 for letter in "abcdef"]
    statuses = [site.client().open(guess, method=method).status_code for guess in guesses for method in ("GET", "POST")]
    assert statuses == [403] * 3 + [429] * 9
    answer = site.client().get(guesses[0])
    assert answer.headers["Retry-After"] == "300"
    assert "Nothing was acknowledged with it" in answer.text
    assert "Log in and open the worklist" in answer.text
    assert [row for row in audited(site) if row[1] == page.REFUSED] == [("", page.REFUSED)] * 3
    assert site.client().get(good).status_code == 200
    assert (
        "Nobody else will be paged" in site.client().post(good, data=site.shown(triaged(1)), follow_redirects=True).text
    )


# --- behind a reverse proxy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "expected"),
    [
        ("10.0.0.5", "192.0.2.7", "192.0.2.7"),
        ("10.0.0.5", "203.0.113.9, 192.0.2.7", "192.0.2.7"),  # what stands before may be made up
        ("10.0.0.5", "192.0.2.7, 10.0.1.1", "192.0.2.7"),  # two proxies of ours
        ("10.0.0.5", "10.0.1.1", "10.0.1.1"),
        ("192.0.2.7", "203.0.113.9", "192.0.2.7"),  # no proxy of ours
        ("10.0.0.5", "", "10.0.0.5"),
        ("10.0.0.5", "unknown", "10.0.0.5"),
        ("10.0.0.5", "192.0.2.7, nonsense", "10.0.0.5"),
        ("10.0.0.5", "192.0.2.7:50123", "192.0.2.7"),
        ("10.0.0.5", "[2001:db8::7]:50123", "2001:db8::7"),
        ("::ffff:10.0.0.5", "2001:db8::7", "2001:db8::7"),
        ("", "192.0.2.7", ""),
    ],
)
def test_an_address_is_believed_of_proxies_that_are_known_only(peer, forwarded_for, expected):
    networks = proxy._networks(("10.0.0.5", "10.0.1.0/24"))
    assert proxy.client_address(peer, forwarded_for, networks) == expected


def test_a_proxy_that_is_no_address_stops_the_start_and_is_named(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"webui.trusted_proxies: 'proxy.example' is no address and no network"),
        open_site(tmp_path, trusted_proxies=("10.0.0.5", "proxy.example")),
    ):
        pass


@pytest.mark.parametrize(("trusted", "noted"), [(("127.0.0.1",), "192.0.2.7"), ((), "127.0.0.1")])
def test_the_service_tells_readers_behind_a_proxy_apart_when_it_knows_the_proxy(tmp_path, trusted, noted):
    with open_site(tmp_path, trusted_proxies=trusted) as site, served(site) as running:
        for header in ("X-Forwarded-For", "x-forwarded-for"):
            requests.post(
                f"{running.config.webui.public_url}/api/acknowledgements/x/1",
                headers={header: "192.0.2.7"},
                timeout=30,
            )
            requests.get(
                f"{running.config.webui.public_url}/page/x",
                headers={header: "203.0.113.1, 192.0.2.7", "X-Forwarded-Host": "evil.example"},
                timeout=30,
            )
        with site.ledger.read() as connection:
            assert set(connection.scalars(select(audit.c.address))) == {noted}


# --- addresses and the log -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["/", "/worklist/rows?disposition=positive", "SERIES", "LINK", "/operations"])
def test_no_link_on_our_pages_has_an_accession_number(site, address):
    event = site.add(1)
    address = {"SERIES": f"/series/{event.series_instance_uid}/1", "LINK": site.link(event)}.get(address, address)
    answer = site.client("ada").get(address)
    assert answer.status_code == 200
    links = re.findall(r'\b(?:href|src|action|formaction|data-[\w-]+)="([^"]*)"', answer.text)
    assert links
    assert [link for link in links if event.accession_number in link] == []


def test_neither_accession_numbers_nor_passwords_nor_links_are_logged(tmp_path, caplog):
    """At level debug, through the real server, with everything that goes wrong on the way."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("urllib3").setLevel(logging.INFO)  # the browser of this test
    with open_site(tmp_path, csrf=True) as site, served(site) as running:
        event, url = site.add(1), running.config.webui.public_url
        link = site.link(event)
        with requests.Session() as browser:
            browser.headers["User-Agent"] = "browser"

            def form(path: str, **fields: str) -> requests.Response:
                tokens = re.findall(r'name="csrf_token" value="([^"]+)"', browser.get(url + path, timeout=30).text)
                target = {"/login": "/login", "/": "/logout"}.get(path, f"{path}/review")
                given = {"csrf_token": tokens[0], **site.shown(event), **fields}
                return browser.post(url + target, data=given, timeout=30)

            browser.get(url + link, timeout=30)
            browser.post(url + link, data={"name": "Anna Reader", **site.shown(event)}, timeout=30)
            browser.get(url + link[:-1], timeout=30)
            form("/login", name="rita", password="a wrong password")
            browser.post(url + "/login", data={"name": "rita", "password": "without a token"}, timeout=30)
            assert form("/login", name="rita", password=PASSWORD).status_code == 200
            browser.get(url + "/", params={"search": event.accession_number}, timeout=30)
            series = f"/series/{event.series_instance_uid}/1"
            assert form(series, verdict="agree", note="Anna Reader says so").status_code == 200
            form(series, verdict="nonsense")
            assert form("/").status_code == 200
            with site.ledger.begin() as connection:
                connection.exec_driver_sql("drop table results")
            assert browser.get(url + link, timeout=30).status_code == 503
    said = caplog.text
    assert "the ledger" in said  # something was logged
    secrets = (event.accession_number, PASSWORD, "a wrong password", "without a token", "Anna", link[6:], link[6:-1])
    for secret in (*secrets, site.config.webui.token, site.config.webui.secret_key):
        assert secret not in said
