import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import AuthResult
from notifier_fakes import HttpServer, Mailbox, configured, free_port, smtp_server, triaged
from sqlalchemy import select

from herald.config import Config, LedgerConfig, NotifierConfig, PagingStep
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError
from herald.events import event_from_json, utc_now
from herald.ledger import Ledger, deliveries, open_ledger
from notifier.channels import Message, open_channel
from notifier.channels.smtp import SmtpChannel
from notifier.channels.webui import WebuiChannel
from notifier.posting import Posting

MESSAGE = Message("0a1b2c3d", "Herald: suspected intracranial haemorrhage 0.97 (IPH)", "Finding\n\nhttps://x/page/y\n")


# --- SMTP ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture
def port() -> int:
    return free_port()


def smtp_channel(port: int, to: str = "on-call@hospital.example", **settings: Any) -> SmtpChannel:
    settings = {"sender": "Herald <herald@ct.hospital.example>", "smtp_timeout_s": 5.0, **settings}
    return SmtpChannel(to, NotifierConfig(smtp_host="127.0.0.1", smtp_port=port, **settings))


def test_an_accepted_page_has_the_headers_that_mail_systems_expect(mailbox: Mailbox, port: int) -> None:
    with smtp_server(mailbox, port):
        smtp_channel(port).send(MESSAGE)
    (email,) = mailbox.emails
    assert email["From"] == "Herald <herald@ct.hospital.example>"
    assert email["To"] == "on-call@hospital.example"
    assert email["Subject"] == MESSAGE.subject
    assert email["Message-ID"] == "<0a1b2c3d@ct.hospital.example>"
    assert abs((parsedate_to_datetime(email["Date"]) - utc_now()).total_seconds()) < 60
    assert email["Auto-Submitted"] == "auto-generated"
    assert email.get_content().replace("\r\n", "\n") == MESSAGE.body


def test_the_same_page_sent_twice_has_the_same_message_id(mailbox: Mailbox, port: int) -> None:
    with smtp_server(mailbox, port):
        smtp_channel(port).send(MESSAGE)
        smtp_channel(port).send(MESSAGE)
    assert mailbox.emails[0]["Message-ID"] == mailbox.emails[1]["Message-ID"]


@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize(
    ("code", "error"), [(451, ChannelUnavailable), (421, ChannelUnavailable), (550, ChannelRefused)]
)
def test_a_4xx_reply_is_worth_another_try_and_a_5xx_reply_is_not(
    mailbox: Mailbox, port: int, stage: str, code: int, error: type[Exception]
) -> None:
    mailbox.answers[stage] = f"{code} so says the server"
    with smtp_server(mailbox, port), pytest.raises(error, match=rf"127\.0\.0\.1:{port} answered {code} so says"):
        smtp_channel(port).send(MESSAGE)
    assert mailbox.emails == []


def test_a_server_that_is_down_is_named_and_used_when_it_is_back(mailbox: Mailbox, port: int) -> None:
    channel = smtp_channel(port)
    with pytest.raises(ChannelUnavailable, match=rf"127\.0\.0\.1:{port} cannot be reached.*check notifier\.smtp_host"):
        channel.send(MESSAGE)
    with smtp_server(mailbox, port):
        channel.send(MESSAGE)
    assert len(mailbox.emails) == 1


def test_a_server_that_never_speaks_is_given_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        channel = smtp_channel(silent.getsockname()[1], smtp_timeout_s=0.2)
        with pytest.raises(ChannelUnavailable, match="timed out"):
            channel.send(MESSAGE)


def test_a_failure_after_acceptance_does_not_make_the_page_unsent(mailbox: Mailbox, port: int) -> None:
    mailbox.answers["QUIT"] = "451 no goodbye"
    with smtp_server(mailbox, port):
        smtp_channel(port).send(MESSAGE)
    assert len(mailbox.emails) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate of this test, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout key.pem"
    command += " -out cert.pem -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_starttls_encrypts_the_page_and_logs_in(
    mailbox: Mailbox, port: int, tls: ssl.SSLContext, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with smtp_server(mailbox, port, tls_context=tls, require_starttls=True, **authenticating("herald", "secret")):
        smtp_channel(port, smtp_starttls=True, smtp_user="herald", smtp_password="secret").send(MESSAGE)
        with pytest.raises(ChannelRefused, match=r"535 .*check notifier\.smtp_user and notifier\.smtp_password") as e:
            smtp_channel(port, smtp_starttls=True, smtp_user="herald", smtp_password="wrong-one").send(MESSAGE)
    assert mailbox.encrypted == [True]
    assert "wrong-one" not in str(e.value)


def authenticating(user: str, password: str) -> dict[str, Any]:
    def authenticate(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        return AuthResult(success=(data.login, data.password) == (user.encode(), password.encode()), handled=False)

    return {"authenticator": authenticate, "auth_required": True}


def test_a_certificate_of_an_unknown_authority_is_refused_before_anything_is_said(
    mailbox: Mailbox, port: int, tls: ssl.SSLContext
) -> None:
    with (
        smtp_server(mailbox, port, tls_context=tls),
        pytest.raises(ChannelRefused, match=r"does not verify: self.signed certificate.*SSL_CERT_FILE"),
    ):
        smtp_channel(port, smtp_starttls=True).send(MESSAGE)
    assert mailbox.emails == []


def test_without_the_starttls_that_was_asked_for_nothing_is_sent_in_the_clear(mailbox: Mailbox, port: int) -> None:
    with smtp_server(mailbox, port), pytest.raises(ChannelRefused, match=r"check notifier\.smtp_starttls"):
        smtp_channel(port, smtp_starttls=True).send(MESSAGE)
    assert mailbox.emails == []


@pytest.mark.parametrize("to", ["", "a@b.example, c@d.example", "a@b.example\r\nBcc: c@d.example"])
def test_what_is_not_one_address_is_a_config_error_that_names_the_setting(to: str) -> None:
    with pytest.raises(ConfigError, match=r"notifier\.steps\.to"):
        open_channel(PagingStep(to=to), NotifierConfig())


# --- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def http() -> Iterator[HttpServer]:
    server = HttpServer()
    yield server
    server.close()


def webui_config(url: str) -> Config:
    return configured(webui_url=url)


def test_a_result_is_put_at_its_series_revision_with_the_token(http: HttpServer) -> None:
    event = triaged(revision=2)
    WebuiChannel(webui_config(http.url + "/")).put(event)
    ((method, path, headers, body),) = http.requests
    assert (method, path) == ("PUT", "/api/results/1.2.3.4/2")
    assert headers["Authorization"] == "Bearer token-for-tests"
    assert headers["Content-Type"] == "application/json"
    assert event_from_json(body) == event
    assert json.loads(body)["event_id"] == str(event.event_id)


@pytest.mark.parametrize(
    ("status", "error", "hint"),
    [
        (500, ChannelUnavailable, "tried again"),
        (503, ChannelUnavailable, "tried again"),
        (429, ChannelUnavailable, "tried again"),
        (401, ChannelRefused, r"webui\.token must be the same"),
        (403, ChannelRefused, r"webui\.token must be the same"),
        (400, ChannelRefused, r"check notifier\.webui_url"),
        (404, ChannelRefused, r"check notifier\.webui_url"),
        (302, ChannelRefused, r"check notifier\.webui_url"),
    ],
)
def test_an_answer_of_the_web_ui_says_whether_to_try_again(
    http: HttpServer, status: int, error: type[Exception], hint: str
) -> None:
    http.status = status
    with pytest.raises(error, match=f"answered {status} .*{hint}"):
        WebuiChannel(webui_config(http.url)).put(triaged())
    assert len(http.requests) == 1


def test_a_web_ui_that_is_down_is_named(port: int) -> None:
    with pytest.raises(ChannelUnavailable, match=rf"http://127\.0\.0\.1:{port} cannot be reached.*notifier\.webui_url"):
        WebuiChannel(webui_config(f"http://127.0.0.1:{port}")).put(triaged())


def test_an_address_that_is_no_url_is_refused() -> None:
    with pytest.raises(ChannelRefused, match=r"check notifier\.webui_url"):
        WebuiChannel(webui_config("127.0.0.1:8080")).put(triaged())


def test_neither_a_proxy_nor_a_netrc_comes_between_the_notifier_and_the_web_ui(
    http: HttpServer, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    WebuiChannel(webui_config(http.url)).put(triaged())
    assert http.requests[0][2]["Authorization"] == "Bearer token-for-tests"


def test_without_a_token_the_notifier_does_not_start() -> None:
    with pytest.raises(ConfigError, match=r"webui\.token"):
        WebuiChannel(Config())


# --- posting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(LedgerConfig(f"sqlite:///{tmp_path / 'ledger.sqlite'}"))
    yield ledger
    ledger.close()


def outcomes(ledger: Ledger) -> list[str]:
    with ledger.read() as connection:
        return list(connection.scalars(select(deliveries.c.outcome).order_by(deliveries.c.delivery_id)))


def test_an_outage_of_the_web_ui_is_one_row_however_often_it_is_tried(ledger: Ledger, http: HttpServer) -> None:
    posting = Posting(ledger, WebuiChannel(webui_config(http.url)))
    http.status = 503
    for _ in range(3):
        with pytest.raises(ChannelUnavailable):
            posting.on_triaged(triaged("negative"))
    http.status = 204
    posting.on_triaged(triaged("negative"))
    posting.on_triaged(triaged("negative"))
    assert outcomes(ledger) == ["unavailable", "sent"]
    with ledger.read() as connection:
        first, last = connection.execute(select(deliveries).order_by(deliveries.c.delivery_id)).all()
    assert "answered 503" in first.error
    assert (last.error, last.channel, last.recipient, last.page_id) == (None, "webui", http.url, None)
    assert 0 < last.duration_s < 10


@pytest.mark.parametrize("disposition", ["positive", "negative", "not_eligible", "failed"])
def test_every_disposition_is_posted(ledger: Ledger, http: HttpServer, disposition: str) -> None:
    Posting(ledger, WebuiChannel(webui_config(http.url))).on_triaged(triaged(disposition))
    assert json.loads(http.requests[0][3])["disposition"] == disposition
    assert outcomes(ledger) == ["sent"]


def test_a_refused_result_is_recorded_and_raised(ledger: Ledger, http: HttpServer) -> None:
    http.status = 401
    with pytest.raises(ChannelRefused):
        Posting(ledger, WebuiChannel(webui_config(http.url))).on_triaged(triaged())
    assert outcomes(ledger) == ["refused"]


# --- Apprise ---------------------------------------------------------------------------------------------------------

apprise_loads = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


@pytest.fixture
def apprise_channel(http: HttpServer) -> Callable[[], Any]:
    step = PagingStep(to=f"json://reader:topsecret@127.0.0.1:{http.port}/page", channel="apprise")
    return lambda: open_channel(step, NotifierConfig())


@apprise_loads
def test_apprise_posts_subject_and_body(http: HttpServer, apprise_channel: Callable[[], Any]) -> None:
    http.status = 200
    apprise_channel().send(MESSAGE)
    ((method, path, _, body),) = http.requests
    assert (method, path) == ("POST", "/page")
    assert json.loads(body)["title"] == MESSAGE.subject
    assert "https://x/page/y" in json.loads(body)["message"]


@apprise_loads
def test_apprise_masks_the_secrets_of_its_address(apprise_channel: Callable[[], Any]) -> None:
    assert "topsecret" not in apprise_channel().recipient


@apprise_loads
def test_apprise_keeps_the_reason_of_a_failure(http: HttpServer, apprise_channel: Callable[[], Any]) -> None:
    http.status = 500
    with pytest.raises(ChannelUnavailable, match=r"did not take the page: .*500") as e:
        apprise_channel().send(MESSAGE)
    assert "topsecret" not in str(e.value)


@apprise_loads
def test_a_url_that_apprise_does_not_know_is_a_config_error_without_the_secrets_in_it() -> None:
    with pytest.raises(ConfigError, match="carrier-pigeon://") as e:
        open_channel(PagingStep(to="carrier-pigeon://key@roof", channel="apprise"), NotifierConfig())
    assert "key" not in str(e.value)
