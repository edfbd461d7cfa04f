import re
import time

import pytest
from sqlalchemy import select, text
from webui_site import PASSWORD, open_site, triaged

from herald.errors import ConfigError
from herald.ledger import audit
from webui import audit as audit_module
from webui.app import create_app

SERIES = "1.2.826.0.1.3680043.8.498.1.1"
STUDY = "1.2.826.0.1.3680043.8.498.1"

# address, method -> status for: nobody, reader, researcher, admin
RULES = [
    ("GET", "/", 302, 200, 200, 200),
    ("GET", "/worklist/rows", 302, 200, 200, 200),
    ("GET", "/worklist/events", 302, 200, 200, 200),
    ("GET", "/next", 302, 302, 302, 302),
    ("GET", f"/series/{SERIES}", 302, 302, 302, 302),
    ("GET", f"/series/{SERIES}/1", 302, 200, 200, 200),
    ("GET", f"/series/{SERIES}/1/slice/1.png", 302, 200, 200, 200),
    ("GET", f"/series/{SERIES}/1/coronal/1.png", 302, 200, 200, 200),
    ("GET", f"/series/{SERIES}/1/volume.nii.gz", 302, 200, 200, 200),
    ("GET", f"/series/{SERIES}/1/mask.nii.gz", 302, 200, 200, 200),
    ("GET", f"/series/{SERIES}/1/original.nii.gz", 302, 404, 404, 404),  # the images are not in the store here
    ("GET", f"/series/{SERIES}/1/original.json", 302, 404, 404, 404),
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
    ("GET", "/adjudication", 302, 200, 200, 200),
    ("GET", f"/adjudication/{STUDY}", 302, 200, 200, 200),
    ("POST", f"/adjudication/{STUDY}", 401, 400, 403, 400),
    ("GET", "/validation", 302, 403, 200, 200),
    ("GET", "/validation/report.html", 302, 403, 400, 400),
    ("GET", "/validation/report.css", 200, 200, 200, 200),
    ("GET", "/health", 200, 200, 200, 200),
    ("PUT", f"/api/results/{SERIES}/1", 401, 401, 401, 401),
    ("GET", "/api/", 404, 404, 404, 404),
    ("GET", "/api/else", 404, 404, 404, 404),
    ("GET", "/static/herald.css", 200, 200, 200, 200),
    ("GET", "/nowhere", 404, 404, 404, 404),
]


ROLES = [None, "rita", "remi", "ada"]
RULE_IDS = [f"{rule[0]} {rule[1]}" for rule in RULES]
ABOUT_A_STUDY = [rule for rule in RULES if rule[0] == "GET" and (STUDY in rule[1] or "<token>" in rule[1])]
FORMS = [rule[1] for rule in RULES if rule[0] == "POST" and not rule[1].startswith(("/api/", "/page/"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp("site")) as site:
        site.add(1)
        yield site


@pytest.fixture(scope="module")
def token(site):
    return site.link(site.add(2)).rpartition("/")[2]


@pytest.fixture(scope="module")
def browsers(site):
    """Makes a browser of one of ROLES; each has logged in once."""
    cookies = {who: site.client(who).get_cookie("herald_session") for who in ROLES if who}

    def browser(who):
        client = site.app.test_client()
        if who:
            client.set_cookie("herald_session", cookies[who].value)
        return client

    return browser


def given(answer) -> int:
    """The status; the rest of a stream is not waited for."""
    answer.close()
    return answer.status_code


@pytest.mark.parametrize("who", ROLES)
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_every_address_answers_each_role_as_the_rules_say(site, browsers, token, rule, who):
    method, address, *statuses = rule
    address, expected = address.replace("<token>", token), statuses[ROLES.index(who)]
    shown = site.shown(triaged(2 if address.startswith("/page/") else 1))
    answer = browsers(who).open(address, method=method, data={"verdict": "agree", **shown})
    assert given(answer) == expected
    if who is None and expected == 302 and "oidc" not in address:
        assert answer.location.startswith("/login?next=")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule[2] == 302], ids=lambda rule: rule[1])
def test_no_other_method_opens_what_needs_a_log_in(browsers, rule):
    for method in ("HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
        assert given(browsers(None).open(rule[1], method=method)) in (302, 401, 405)


def test_the_rules_name_every_address_of_the_application(site):
    adapter = site.app.url_map.bind("localhost")
    covered = set()
    for method, address, *_ in RULES:
        if address != "/nowhere":
            rule, _ = adapter.match(address, method=method, return_rule=True)
            covered.add((rule.rule, method))
    for rule in site.app.url_map.iter_rules():
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            assert (rule.rule, method) in covered, f"{method} {rule} has no access rule in this test"


def test_no_address_of_the_application_holds_an_accession_number_or_a_name(site):
    for rule in site.app.url_map.iter_rules():
        assert rule.arguments <= {
            *("filename", "path"),
            *("series_instance_uid", "study_instance_uid", "revision", "number", "plane"),
            *("token", "topic", "letter_id", "kind"),
        }, f"{rule}: an address stands in histories and in logs of proxies; put what names somebody elsewhere"


# --- who saw which study ---------------------------------------------------------------------------------------------


@pytest.fixture
def seen(site):
    """Rows of the audit table about a study that were added in this test: user and series."""
    site.app.extensions[audit_module.EXTENSION] = audit_module.Noted()
    with site.ledger.begin() as connection:
        connection.execute(audit.delete())

    def rows() -> list[tuple[str, str]]:
        statement = select(audit.c.user, audit.c.series_instance_uid).where(audit.c.study_instance_uid.is_not(None))
        with site.ledger.read() as connection:
            return [tuple(row) for row in connection.execute(statement)]

    return rows


@pytest.mark.parametrize("who", ROLES)
@pytest.mark.parametrize("rule", ABOUT_A_STUDY, ids=lambda rule: rule[1])
def test_who_is_shown_something_of_a_study_is_in_the_audit(browsers, token, rule, who, seen):
    method, address, *_ = rule
    status = given(browsers(who).open(address.replace("<token>", token), method=method))
    assert seen() if status == 200 else status == 404 or not seen()
    for user, series in seen():
        assert user in (who, "pager link")
        assert series is None or series.startswith(STUDY[:-1])  # of this series or of the token's


def test_the_pictures_of_a_page_belong_to_its_view_and_one_without_a_page_is_a_view(browsers, seen, monkeypatch):
    picture = f"/series/{SERIES}/1/slice/1.png"
    rita = browsers("rita")
    for _ in range(3):
        assert rita.get(picture).status_code == 200
    assert seen() == [("rita", SERIES)]
    assert browsers("ada").get(picture).status_code == 200
    assert seen() == [("rita", SERIES), ("ada", SERIES)]
    now = time.monotonic()
    monkeypatch.setattr(audit_module.time, "monotonic", lambda: now + audit_module.REMEMBERED_S + 1)
    assert rita.get(picture).status_code == 200
    assert len(seen()) == 3


def test_every_view_of_the_page_is_noted_and_its_pictures_not_again(browsers, seen):
    rita = browsers("rita")
    for _ in range(2):
        rita.get(f"/series/{SERIES}/1")
        rita.get(f"/series/{SERIES}/1/slice/1.png")
    noted = [row for row in seen() if row == ("rita", SERIES)]
    with_prediction = 1  # that the prediction was shown is noted once
    assert len(noted) == 2 + with_prediction


def test_a_study_that_cannot_be_noted_is_not_shown(tmp_path):
    with open_site(tmp_path) as site:
        event = site.add(1)
        client = site.client("rita")
        with site.ledger.begin() as connection:
            connection.execute(text("drop table audit"))
        answer = client.get(f"/series/{event.series_instance_uid}/1/slice/1.png")
        assert answer.status_code == 503
        assert "ledger cannot be reached" in answer.text


def test_memory_of_views_does_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr(audit_module, "_MOST_REMEMBERED", 2)
    noted = audit_module.Noted()
    for name in "abc":
        noted.remember(name)
    assert [noted.lately(name) for name in "abc"] == [False, True, True]


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", FORMS)
def test_every_form_asks_for_its_csrf_token(site, browsers, address):
    client = browsers("ada")
    site.app.config["WTF_CSRF_ENABLED"] = True
    try:
        answer = client.post(address, data={"verdict": "agree", "name": "ada", "password": PASSWORD})
    finally:
        site.app.config["WTF_CSRF_ENABLED"] = False
    assert answer.status_code == 400
    assert "form has expired" in answer.text


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
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "geolocation=()" in headers["Permissions-Policy"]
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("good", [True, False])
def test_the_address_of_a_link_page_is_told_to_no_other_page(site, token, good):
    headers = site.app.test_client().get(f"/page/{token if good else 'x'}").headers
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("address", ["/static/herald.css", "/worklist/rows", f"/series/{SERIES}/1/slice/1.png"])
def test_no_other_site_can_take_in_what_we_answer(site, address):
    answer = site.client("rita").get(address)
    answer.close()
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in answer.headers


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
