import re

import pytest
from sqlalchemy import text
from webui_site import PASSWORD, open_site

from herald.errors import ConfigError
from webui.app import create_app

SERIES = "1.2.826.0.1.3680043.8.498.1.1"

# address, method -> status for: nobody, reader, researcher, admin
RULES = [
    ("GET", "/", 302, 200, 200, 200),
    ("GET", "/worklist/rows", 302, 200, 200, 200),
    ("GET", "/worklist/events", 302, 200, 200, 200),
    ("GET", "/next", 302, 302, 302, 302),
    ("GET", f"/series/{SERIES}", 302, 302, 302, 302),
    ("GET", f"/series/{SERIES}/1", 302, 200, 200, 200),
    ("GET", f"/series/{SERIES}/1/slice/1.png", 302, 200, 200, 200),
    ("POST", f"/series/{SERIES}/1/review", 401, 303, 403, 303),
    ("POST", f"/series/{SERIES}/1/review/description", 401, 303, 403, 303),
    ("POST", f"/series/{SERIES}/1/review/undo", 401, 303, 403, 303),
    ("POST", "/logout", 401, 303, 303, 303),
    ("GET", "/login/oidc", 404, 404, 404, 404),  # not configured; tests/test_webui_oidc.py has the rest
    ("GET", "/login/oidc/callback", 404, 404, 404, 404),
    ("GET", "/login", 200, 200, 200, 200),
    ("POST", "/login", 401, 401, 401, 401),
    ("GET", "/page/<token>", 200, 200, 200, 200),
    ("POST", "/page/<token>", 403, 303, 403, 303),
    ("POST", f"/api/acknowledgements/{SERIES}/1", 401, 401, 401, 401),
    ("GET", "/operations", 302, 200, 200, 200),
    ("GET", "/operations/banner", 302, 200, 200, 200),
    ("GET", "/operations/condition", 302, 403, 403, 200),
    ("GET", "/operations/dead-letters/series/1", 302, 403, 403, 404),
    ("POST", "/operations/dead-letters/series/1/replay", 401, 403, 403, 303),
    ("POST", "/operations/reconcile", 401, 403, 403, 303),
    ("GET", "/health", 200, 200, 200, 200),
    ("PUT", f"/api/results/{SERIES}/1", 401, 401, 401, 401),
    ("GET", "/api/", 404, 404, 404, 404),
    ("GET", "/api/else", 404, 404, 404, 404),
    ("GET", "/static/herald.css", 200, 200, 200, 200),
    ("GET", "/nowhere", 404, 404, 404, 404),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp("site")) as site:
        site.add(1)
        yield site


@pytest.fixture(scope="module")
def token(site):
    return site.link(site.add(2)).rpartition("/")[2]


@pytest.mark.parametrize("who", [None, "rita", "remi", "ada"])
@pytest.mark.parametrize("rule", RULES, ids=[f"{rule[0]} {rule[1]}" for rule in RULES])
def test_every_address_answers_each_role_as_the_rules_say(site, token, rule, who):
    method, address, *statuses = rule
    expected = statuses[[None, "rita", "remi", "ada"].index(who)]
    client = site.client(who)
    answer = client.open(address.replace("<token>", token), method=method, data={"verdict": "agree"})
    answer.close()
    assert answer.status_code == expected
    if who is None and expected == 302:
        assert answer.location.startswith("/login?next=")


def test_the_rules_name_every_address_of_the_application(site):
    named = [(method, re.sub(r"^/static/.*", "/static/x", address)) for method, address, *_ in RULES]
    adapter = site.app.url_map.bind("localhost")
    covered = set()
    for method, address in named:
        if address != "/nowhere":
            covered.add((adapter.match(address, method=method)[0], method))
    for rule in site.app.url_map.iter_rules():
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            assert (rule.endpoint, method) in covered, f"{method} {rule} has no access rule in this test"


@pytest.mark.parametrize(
    ("who", "address"),
    [("rita", f"/series/{SERIES}/1/review"), ("rita", "/logout"), (None, "/login")],
)
def test_a_form_without_its_csrf_token_changes_nothing(tmp_path, who, address):
    with open_site(tmp_path) as site:
        site.add(1)
        client = site.client(who)
        site.app.config["WTF_CSRF_ENABLED"] = True
        data = {"verdict": "agree", "name": "rita", "password": PASSWORD}
        answer = client.post(address, data=data)
        assert answer.status_code == 400
        assert "form has expired" in answer.text
        with site.ledger.read() as connection:
            assert connection.execute(text("select count(*) from reviews")).scalar() == 0
        if who:
            assert client.get("/").status_code == 200  # still logged in


def test_a_form_with_its_csrf_token_is_taken(tmp_path):
    with open_site(tmp_path, csrf=True) as site:
        client = site.app.test_client()
        (token,) = re.findall(r'name="csrf_token" value="([^"]+)"', client.get("/login").text)
        answer = client.post("/login", data={"name": "rita", "password": PASSWORD, "csrf_token": token})
        assert (answer.status_code, answer.location) == (303, "/")


@pytest.mark.parametrize("address", ["/", "/login", f"/series/{SERIES}/1", "/nowhere", "/health"])
def test_every_answer_carries_the_safety_headers(site, address):
    headers = site.client("rita").get(address).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("address", ["/", "/login", f"/series/{SERIES}/1", f"/series/{SERIES}/1?mask=0"])
def test_no_page_has_script_or_style_inside(site, address):
    page = site.client("ada").get(address).text
    assert not re.search(r"<script(?![^>]*\bsrc=)", page)
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)


def test_a_ledger_that_is_down_is_said_in_words_with_what_to_do(tmp_path):
    with open_site(tmp_path) as site:
        event = site.add(1)
        client = site.client("rita")
        with site.ledger.begin() as connection:
            connection.execute(text("drop table users"))
        for address in ("/", f"/series/{event.series_instance_uid}/1"):
            answer = client.get(address)
            assert answer.status_code == 503
            assert "ledger cannot be reached" in answer.text
            assert "Traceback" not in answer.text
            assert "sqlite" not in answer.text


def test_a_store_that_cannot_be_read_is_said_in_words(tmp_path):
    with open_site(tmp_path) as site:
        event = site.add(1)
        path = site.store.prediction_path(event.study_instance_uid, event.series_instance_uid, 1)
        path.write_bytes(b"not a prediction")
        answer = site.client("rita").get(f"/series/{event.series_instance_uid}/1")
        assert answer.status_code == 503
        assert "study store cannot be read" in answer.text


def test_an_error_that_nobody_foresaw_shows_no_traceback(tmp_path, monkeypatch):
    with open_site(tmp_path) as site:
        monkeypatch.setattr("webui.worklist.record.find_worklist", lambda *_: 1 / 0)
        answer = site.client("rita").get("/")
        assert answer.status_code == 500
        assert "Something went wrong on our side" in answer.text
        assert "ZeroDivisionError" not in answer.text


@pytest.mark.parametrize("secret", ["token", "secret_key"])
def test_the_application_refuses_to_start_without_its_secrets(tmp_path, secret):
    from dataclasses import replace

    with open_site(tmp_path) as site:
        config = replace(site.config, webui=replace(site.config.webui, **{secret: ""}))
        with pytest.raises(ConfigError, match=f"webui.{secret}"):
            create_app(config, site.ledger, site.store, site.bus)
