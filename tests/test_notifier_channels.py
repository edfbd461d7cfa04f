import base64
import json
import logging
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from aiosmtpd.smtp import AuthResult
from hl7apy.parser import parse_message  # type: ignore[import-untyped]
from notifier_fakes import HttpServer, Mailbox, MllpListener, configured, free_port, smtp_server, triaged
from sqlalchemy import select
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from herald.config import Config, LedgerConfig, NotifierConfig, PagingStep
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError
from herald.events import event_from_json, utc_now
from herald.ledger import Ledger, deliveries, open_ledger
from herald.links import reply_token
from notifier.channels import Message, open_channel
from notifier.channels.smtp import SmtpChannel
from notifier.channels.webui import WebuiChannel
from notifier.message import page_text
from notifier.posting import Posting

PAGE_ID = "0a1b2c3d-4e5f-5071-8293-a4b5c6d7e8f9"
TEXT = page_text(triaged(), configured())
MESSAGE = Message(PAGE_ID, TEXT.subject, TEXT.body, TEXT.short, TEXT.link, triaged())
NOTICE = Message(PAGE_ID, "No series for 60 minutes at ÖST", "Check the network.\n")
PNG = b"\x89PNG\r\n\x1a\nof a slice"


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
    assert email["Message-ID"] == f"<{PAGE_ID}@ct.hospital.example>"
    assert email["Reply-To"] is None
    assert abs((parsedate_to_datetime(email["Date"]) - utc_now()).total_seconds()) < 60
    assert email["Auto-Submitted"] == "auto-generated"
    assert plain(email) == MESSAGE.body


def plain(email: EmailMessage) -> str:
    text: str = part(email, "plain").get_content()
    return text.replace("\r\n", "\n")


def part(email: EmailMessage, kind: Literal["plain", "html", "related"]) -> Any:
    found = email.get_body((kind,))
    assert found is not None
    return found


def test_an_email_shows_the_key_slice_within_its_html(mailbox: Mailbox, port: int) -> None:
    with smtp_server(mailbox, port):
        smtp_channel(port).send(replace(MESSAGE, picture=lambda: PNG))
    (email,) = mailbox.emails
    assert email.get_content_type() == "multipart/alternative"
    assert plain(email) == MESSAGE.body
    (image,) = [p for p in email.walk() if p.get_content_maintype() == "image"]
    assert image.get_content() == PNG
    assert image.get_content_disposition() == "inline"
    html = part(email, "html").get_content()
    assert f'src="cid:{image["Content-ID"].strip(" <>")}"' in html
    assert f'href="{MESSAGE.link}"' in html
    assert html.count("Review and acknowledge") == html.count(MESSAGE.link) == 1
    assert "Subarachnoid (SAH): possible 0.61, 0.5 ml, slice 9 of 32" in html
    assert "width=device-width" in html
    assert re.findall(r"(?<!max-)width:\d+px", html) == []  # nothing wider than a phone


def test_a_link_that_was_signed_anew_for_another_attempt_stands_alone_in_the_html(mailbox: Mailbox, port: int) -> None:
    with smtp_server(mailbox, port):
        smtp_channel(port).send(replace(MESSAGE, link="https://herald.example/page/anew"))
    html = part(mailbox.emails[0], "html").get_content()
    assert re.findall(r"https://[^\"<]*", html) == ["https://herald.example/page/anew"]


@pytest.mark.parametrize(("shown", "png"), [(True, None), (False, PNG)])
def test_an_email_without_a_picture_has_no_place_for_one(
    mailbox: Mailbox, port: int, shown: bool, png: bytes | None
) -> None:
    with smtp_server(mailbox, port):
        smtp_channel(port, picture=shown).send(replace(MESSAGE, picture=lambda: png))
    (email,) = mailbox.emails
    assert [p.get_content_type() for p in email.walk()] == ["multipart/alternative", "text/plain", "text/html"]
    assert "<img" not in part(email, "html").get_content()


def test_a_message_to_operators_is_escaped_and_has_no_link(mailbox: Mailbox, port: int) -> None:
    with smtp_server(mailbox, port):
        smtp_channel(port).send(replace(NOTICE, body="<b>router</b> & server\n"))
    html = part(mailbox.emails[0], "html").get_content()
    assert "&lt;b&gt;router&lt;/b&gt; &amp; server" in html
    assert "<a " not in html


@pytest.mark.parametrize("channel", ["smtp", "pager"])
def test_an_answer_by_email_goes_to_an_address_of_this_page(mailbox: Mailbox, port: int, channel: Any) -> None:
    config = NotifierConfig(smtp_port=port, reply_address="herald@hospital.example")
    with smtp_server(mailbox, port):
        open_channel(PagingStep(to="a@b.example", channel=channel), config).send(MESSAGE)
        open_channel(PagingStep(to="a@b.example", channel=channel), config).send(NOTICE)
    to_page, to_notice = (email["Reply-To"] for email in mailbox.emails)
    assert reply_token("herald@hospital.example", to_page) == MESSAGE.link.rpartition("/")[2]
    assert to_notice is None


@pytest.mark.parametrize(
    "address", [f"{'h' * 32}@hospital.example", "hospital.example", "Herald <herald@hospital.example>"]
)
def test_an_address_for_answers_that_cannot_carry_a_token_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError, match=r"notifier\.reply_address"):
        open_channel(PagingStep(to="a@b.example"), NotifierConfig(reply_address=address))


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


def test_tls_from_the_first_byte_encrypts_the_page(
    mailbox: Mailbox, port: int, tls: ssl.SSLContext, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with smtp_server(mailbox, port, ssl_context=tls):
        with pytest.raises(ChannelRefused, match="does not verify"):
            smtp_channel(port, smtp_tls=True).send(MESSAGE)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        smtp_channel(port, smtp_tls=True).send(MESSAGE)
    assert [plain(email) for email in mailbox.emails] == [MESSAGE.body]


def test_two_kinds_of_tls_at_once_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"notifier\.smtp_tls and notifier\.smtp_starttls exclude each other"):
        smtp_channel(1, smtp_tls=True, smtp_starttls=True)


@pytest.mark.parametrize("channel", ["smtp", "pager"])
@pytest.mark.parametrize("to", ["", "a@b.example, c@d.example", "a@b.example\r\nBcc: c@d.example"])
def test_what_is_not_one_address_is_a_config_error_that_names_the_setting(to: str, channel: Any) -> None:
    with pytest.raises(ConfigError, match=r"notifier\.steps\.to"):
        open_channel(PagingStep(to=to, channel=channel), NotifierConfig())


# --- pager -----------------------------------------------------------------------------------------------------------


def test_a_pager_gets_the_160_characters_and_nothing_else(mailbox: Mailbox, port: int) -> None:
    channel = open_channel(PagingStep(to="5551234@pager.example", channel="pager"), NotifierConfig(smtp_port=port))
    with smtp_server(mailbox, port):
        channel.send(replace(MESSAGE, picture=lambda: PNG))
        channel.send(NOTICE)
    page, notice = mailbox.emails
    assert [p.get_content_type() for p in page.walk()] == ["text/plain"]
    assert (page["Subject"], page["Content-Transfer-Encoding"]) == (None, "7bit")
    assert page.get_content().rstrip("\r\n") == MESSAGE.short
    assert page["Message-ID"].startswith(f"<{PAGE_ID}@")
    assert notice.get_content().rstrip("\r\n") == "No series for 60 minutes at OST"


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


# --- webhook ---------------------------------------------------------------------------------------------------------

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty bytes or so").decode()


def webhook(url: str, secret: str = SECRET) -> Any:
    return open_channel(PagingStep(to=url, channel="webhook"), NotifierConfig(webhook_secret=secret))


def test_a_webhook_is_signed_and_the_same_page_has_the_same_id(http: HttpServer) -> None:
    channel = webhook(http.url + "/hook?key=k")
    channel.send(MESSAGE)
    channel.send(MESSAGE)
    for method, path, headers, body in http.requests:
        assert (method, path) == ("POST", "/hook?key=k")
        assert {k.lower(): v for k, v in headers.items()}["webhook-id"] == PAGE_ID
        read = Webhook(SECRET).verify(body, headers)
        assert read["type"] == "herald.page"
        assert read["data"]["link"] == MESSAGE.link
        assert read["data"]["accession_suffix"] == "...0329"
        assert read["data"]["findings"][0]["likelihood"] == "very likely"
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body.replace(b"very likely", b"possible"), headers)
    assert len(http.requests) == 2


def test_a_webhook_carries_a_message_to_operators(http: HttpServer) -> None:
    webhook(http.url).send(NOTICE)
    body = json.loads(http.requests[0][3])
    assert (body["type"], body["data"]["text"]) == ("herald.notice", NOTICE.body)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (500, ChannelUnavailable),
        (503, ChannelUnavailable),
        (429, ChannelUnavailable),
        (408, ChannelUnavailable),
        (302, ChannelRefused),
        (400, ChannelRefused),
        (401, ChannelRefused),
        (404, ChannelRefused),
        (410, ChannelRefused),
    ],
)
def test_the_answer_to_a_webhook_says_whether_to_try_again(
    http: HttpServer, status: int, error: type[Exception]
) -> None:
    http.status = status
    with pytest.raises(error, match=f"answered {status}") as e:
        webhook(http.url + "/hidden-path").send(MESSAGE)
    assert len(http.requests) == 1
    assert "hidden-path" not in str(e.value)


def test_a_receiver_of_webhooks_that_is_down_is_named_without_its_secrets(port: int) -> None:
    channel = webhook(f"http://reader:topsecret@127.0.0.1:{port}/hidden-path")
    assert channel.recipient == f"http://127.0.0.1:{port}/…"
    with pytest.raises(ChannelUnavailable, match=rf"http://127\.0\.0\.1:{port}/… cannot be reached") as e:
        channel.send(MESSAGE)
    assert "hidden-path" not in str(e.value)
    assert "topsecret" not in str(e.value)


def test_a_webhook_logs_in_as_its_url_says_and_never_as_a_netrc_does(
    http: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    webhook(http.url).send(MESSAGE)
    webhook(http.url.replace("http://", "http://reader:p%40ss@")).send(MESSAGE)
    without, as_reader = (headers for _, _, headers, _ in http.requests)
    assert "Authorization" not in without
    assert base64.b64decode(as_reader["Authorization"].removeprefix("Basic ")) == b"reader:p@ss"


@pytest.mark.parametrize("url", ["", "hospital.example/hook", "ftp://hospital.example", "https://:8/x", "https://h:x/"])
def test_what_is_no_url_for_a_webhook_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"notifier\.steps\.to"):
        webhook(url)


@pytest.mark.parametrize("secret", ["", "whsec_", "not base 64!", "c2hvcnQ="])
def test_a_webhook_without_a_good_secret_is_a_config_error(secret: str) -> None:
    with pytest.raises(ConfigError, match=r"notifier\.webhook_secret") as e:
        webhook("https://hospital.example/hook", secret)
    assert not secret or secret not in str(e.value).replace("whsec_ before", "")


# --- HL7 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ris() -> Iterator[MllpListener]:
    listener = MllpListener()
    yield listener
    listener.close()


def hl7(to: str, **settings: Any) -> Any:
    return open_channel(PagingStep(to=to, channel="hl7"), NotifierConfig(**settings))


@pytest.mark.parametrize("code", ["AA", "CA"])
def test_a_result_is_filed_by_its_accession_number_as_preliminary_and_without_identity(
    ris: MllpListener, code: str
) -> None:
    ris.code = code
    hl7(ris.address, hl7_receiver="RIS-EAST").send(MESSAGE)
    (sent,) = ris.messages
    message = parse_message(sent)
    assert message.validate()
    assert message.msh.msh_5.to_er7() == "RIS-EAST"
    assert message.msh.msh_11.to_er7() == "P"
    segments = [line.split("|") for line in sent.strip().split("\r")]
    assert [s for s in segments if s[0] == "PID"] == [["PID", "1", "", '""', "", "^^^^^^U"]]
    (obr,) = [s for s in segments if s[0] == "OBR"]
    assert obr[2] == obr[3] == "ACC20260329"
    assert (obr[7], obr[25]) == ("20260329011530+0000", "P")
    numbers = {s[3].partition("^")[0]: (s[4], s[5], s[8]) for s in segments if s[:3:2] == ["OBX", "NM"]}
    assert numbers["ANY_PROBABILITY"] == ("1", "0.9710", "A")
    assert numbers["SAH_VOLUME"] == ("3", "0.50", "")
    assert numbers["IPH_SLICE"] == ("2", "14", "")
    text = [s[5] for s in segments if s[:3:2] == ["OBX", "TX"]]
    assert "AI triage, not a diagnosis" in text
    assert MESSAGE.link in text
    assert [s[1] for s in segments if s[0] == "OBX"] == [str(i + 1) for i in range(len(segments) - 3)]


def test_a_result_sent_again_has_the_same_control_id(ris: MllpListener) -> None:
    hl7(ris.address).send(MESSAGE)
    hl7(ris.address).send(MESSAGE)
    ids = {parse_message(sent).msh.msh_10.to_er7() for sent in ris.messages}
    assert ids == {"0a1b2c3d4e5f50718293"}


def test_delimiters_in_what_a_scanner_sends_stay_within_their_field(ris: MllpListener) -> None:
    hostile = "A|B^C&D~E\\F\r\nPID|9"
    hl7(ris.address).send(replace(MESSAGE, event=triaged(accession_number=hostile), body=f"Scanner: {hostile}\n"))
    assert parse_message(ris.messages[0]).validate()
    lines = ris.messages[0].strip().split("\r")
    assert [line[:3] for line in lines].count("PID") == 1
    (obr,) = [line.split("|") for line in lines if line.startswith("OBR")]
    assert obr[2] == obr[3] == "A\\F\\B\\S\\C\\T\\D\\R\\E\\E\\FPID\\F\\9"


def test_a_message_to_operators_is_for_training_and_has_no_order(ris: MllpListener) -> None:
    hl7(ris.address).send(NOTICE)
    message = parse_message(ris.messages[0])
    assert message.validate()
    assert message.msh.msh_11.to_er7() == "T"
    assert "|Check the network.|" in ris.messages[0]


@pytest.mark.parametrize("code", ["AE", "AR", "CE", "CR"])
def test_a_result_that_the_ris_does_not_take_is_refused_in_its_words(ris: MllpListener, code: str) -> None:
    ris.code = code
    with pytest.raises(ChannelRefused, match=rf"{ris.address} answered {code}: .*no such order"):
        hl7(ris.address).send(MESSAGE)


def test_a_result_without_an_accession_number_is_refused_before_anything_is_sent(ris: MllpListener) -> None:
    with pytest.raises(ChannelRefused, match="no accession number"):
        hl7(ris.address).send(replace(MESSAGE, event=triaged(accession_number=" ")))
    assert ris.messages == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "closed before the end"),
        ("HTTP/1.1 400 Bad Request\r\n\r\n", "closed before the end"),
        ("\x0bnonsense\x1c\r", "no HL7 acknowledgement"),
        ("\x0bMSH|^~\\&|RIS||HERALD||20261122||ACK|1|P|2.5\r\x1c\r", "answered nothing"),
    ],
)
def test_an_answer_that_is_broken_is_worth_another_try(ris: MllpListener, answer: str, reason: str) -> None:
    ris.answer = answer
    with pytest.raises(ChannelUnavailable, match=reason):
        hl7(ris.address).send(MESSAGE)


def test_an_answer_to_another_message_accepts_nothing(ris: MllpListener) -> None:
    ris.about = "another"
    with pytest.raises(ChannelUnavailable, match="answered AA to message another instead of 0a1b2c3d4e5f50718293"):
        hl7(ris.address).send(MESSAGE)


def test_a_listener_that_is_down_or_silent_is_worth_another_try(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChannelUnavailable, match=rf"127\.0\.0\.1:{port} gave no answer: .*check notifier\.steps\.to"):
        hl7(f"127.0.0.1:{port}").send(MESSAGE)
    monkeypatch.setattr("notifier.channels.hl7.TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ChannelUnavailable, match="timed out"):
        hl7(f"127.0.0.1:{silent.getsockname()[1]}").send(MESSAGE)


@pytest.mark.parametrize("to", ["", "ris.example", "ris.example:", ":2575", "ris:x", "mllp://ris:2575", "ris:2575/x"])
def test_what_is_no_listener_is_a_config_error(to: str) -> None:
    with pytest.raises(ConfigError, match=r"notifier\.steps\.to.*HOST:PORT"):
        hl7(to)


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
    assert MESSAGE.link in json.loads(body)["message"]


@apprise_loads
def test_apprise_sends_160_characters_where_a_service_takes_no_more(
    http: HttpServer, apprise_channel: Callable[[], Any]
) -> None:
    channel = apprise_channel()
    channel._service.body_maxlen = 160  # as of services for SMS
    channel.send(MESSAGE)
    assert json.loads(http.requests[0][3])["message"] == MESSAGE.short


@apprise_loads
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, ChannelRefused),
        (401, ChannelRefused),
        (404, ChannelRefused),
        (408, ChannelUnavailable),
        (429, ChannelUnavailable),
        (500, ChannelUnavailable),
    ],
)
def test_apprise_is_not_tried_again_after_a_refusal(
    http: HttpServer, apprise_channel: Callable[[], Any], status: int, error: type[Exception]
) -> None:
    http.status = status
    with pytest.raises(error, match=f"error={status}"):
        apprise_channel().send(MESSAGE)


@apprise_loads
def test_a_failure_of_another_page_at_the_same_time_is_not_taken_for_this_one_s(
    http: HttpServer, apprise_channel: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = apprise_channel()

    def notify(**_: Any) -> bool:
        other = threading.Thread(target=logging.getLogger("apprise").warning, args=("another page: error=401",))
        other.start()
        other.join()
        return False

    monkeypatch.setattr(channel._service, "notify", notify)
    with pytest.raises(ChannelUnavailable, match="Apprise gave no reason"):
        channel.send(MESSAGE)


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
