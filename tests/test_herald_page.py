import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from notifier_fakes import NOON, HttpServer, Mailbox, configured, free_port, smtp_server, triaged
from sqlalchemy import insert
from typer.testing import CliRunner

from herald import cli
from herald.config import Config, LedgerConfig, PagingPolicy, PagingSite, PagingStep
from herald.errors import ChannelRefused, ConfigError
from herald.events import SeriesReviewed, SeriesTriaged
from herald.ledger import Ledger, open_ledger, results, series
from herald.page import Explanation, explain, send_tests, targets
from notifier.paging import Paging
from notifier.service import open_channels

STEPS = (
    PagingStep(to="first@hospital.example"),
    PagingStep(to="on-call:chief", channel="pager", after_minutes=10),
    PagingStep(to="third@hospital.example", after_minutes=20),
)
NIGHTS = PagingPolicy(
    name="nights",
    sites=("north",),
    from_time="18:00",
    until_time="07:00",
    steps=(PagingStep(to="night@hospital.example"),),
)
SITES = (PagingSite(name="north", calling_ae_titles=("NORTH1",), mode="shadow"),)


@pytest.fixture
def node(tmp_path: Path) -> Config:
    """Live, with a site in shadow mode; the chief's shift ends at quarter past twelve, UTC."""
    roster = tmp_path / "rota.csv"
    roster.write_text("role,from,until,to\nchief,2026-03-29T00:00Z,2026-03-29T12:15Z,chief@hospital.example\n")
    config = configured(
        mode="live",
        steps=STEPS,
        policies=(NIGHTS,),
        sites=SITES,
        time_zone="UTC",
        roster=str(roster),
        operators=(PagingStep(to="it@hospital.example"),),
        smtp_port=free_port(),
    )
    return replace(config, ledger=LedgerConfig(url=f"sqlite:///{tmp_path / 'ledger.sqlite'}"))


@pytest.fixture
def ledger(node: Config) -> Iterator[Ledger]:
    ledger = open_ledger(node.ledger)
    yield ledger
    ledger.close()


class Told:
    def __init__(self, recipient: str, error: Exception | None = None) -> None:
        self.recipient = recipient
        self.error = error

    def send(self, message: Any) -> None:
        if self.error:
            raise self.error


def paging(ledger: Ledger, config: Config, at: datetime = NOON, error: Exception | None = None) -> Paging:
    return Paging(
        ledger,
        config,
        lambda step: Told(step.to, error),
        on_call=lambda role, _: f"{role}@hospital.example",
        now=lambda: at,
    )


def post(ledger: Ledger, event: SeriesTriaged) -> None:
    """As the web UI does with a result."""
    with ledger.begin() as connection:
        connection.execute(
            insert(results).values(
                series_instance_uid=event.series_instance_uid,
                revision=event.revision,
                study_instance_uid=event.study_instance_uid,
                accession_number=event.accession_number,
                scanner=event.scanner,
                disposition=event.disposition,
                event=msgspec.json.decode(event.to_json()),
                triaged_at=event.occurred_at,
                posted_at=event.occurred_at,
            )
        )


def explained(config: Config, what: str = "1.2.3", at: datetime = NOON) -> Explanation:
    (told,) = explain(config, what, at)
    return told


def test_nothing_is_explained_of_a_study_that_is_not_known(node: Config, ledger: Ledger) -> None:
    assert explain(node, "1.2.3") == []


def test_a_paged_study_shows_what_was_sent_and_who_is_next_from_the_roster_of_that_time(
    node: Config, ledger: Ledger
) -> None:
    paging(ledger, node).on_triaged(triaged())
    told = explained(node)
    assert (told.positive, told.site, told.mode, told.policy) == (True, "", "live", "notifier.steps")
    assert told.finding == "iph, probability 0.97"
    assert told.policies == (
        "nights: does not fit, no site is not north; sun 12:00 UTC is not within 18:00 to 07:00",
        "notifier.steps: no policy fits",
    )
    first, second, third = told.steps
    assert (first.step, first.state, first.recipient, first.at) == (1, "sent", "first@hospital.example", NOON)
    assert (second.state, second.channel, second.recipient) == ("planned", "pager", "chief@hospital.example")
    assert second.at == NOON + timedelta(minutes=10)
    assert (
        second.reason == "on-call:chief; 10 min after the finding, while nobody has acknowledged, or when step 1 fails"
    )
    assert (third.state, third.recipient) == ("planned", "third@hospital.example")
    assert told.afterwards == "15 min after the last page without an answer: 1 operator told"


def test_a_role_that_nobody_has_at_its_time_is_told_beforehand(node: Config, ledger: Ledger) -> None:
    paging(ledger, node).on_triaged(triaged())
    second = explained(node, at=NOON + timedelta(minutes=16)).steps[1]
    assert second.recipient == "on-call:chief"
    assert second.reason.startswith("nobody is on call for chief at Sun 2026-03-29 12:16 UTC")


def test_a_failed_and_an_acknowledged_page_tell_why_and_by_whom(node: Config, ledger: Ledger) -> None:
    paging(ledger, node, error=ChannelRefused("the server answered 550")).on_triaged(triaged())
    told = explained(node)
    assert [step.state for step in told.steps] == ["failed", "failed", "exhausted"]
    assert told.steps[0].reason == "the server answered 550"
    review = SeriesReviewed(
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.4",
        revision=1,
        occurred_at=NOON,
        review_id="r1",
        action="agree",
        reader="dr-night",
    )
    paging(ledger, node).on_reviewed(review)
    assert explained(node).steps[-1].reason == "acknowledged by dr-night at 2026-03-29 12:00:00 UTC"


def test_steps_after_an_answer_are_not_needed(node: Config, ledger: Ledger) -> None:
    paging(ledger, node).on_triaged(triaged())
    review = SeriesReviewed(
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.4",
        revision=1,
        occurred_at=NOON,
        review_id="r1",
        action="acknowledge",
        reader="dr-night",
    )
    paging(ledger, node).on_reviewed(review)
    assert [step.state for step in explained(node).steps] == ["acknowledged", "not needed", "not needed"]


def test_a_page_goes_by_the_policy_it_was_made_by_and_a_change_of_the_configuration_is_told(
    node: Config, ledger: Ledger
) -> None:
    evening = NOON.replace(hour=20)
    paging(ledger, node, evening).on_triaged(triaged(calling_ae_title="NORTH1", occurred_at=evening))
    told = explained(node, at=evening)
    assert (told.site, told.mode, told.policy) == ("north", "shadow", "nights")
    assert told.policies == ("nights: fits, site north is north; sun 20:00 UTC is within 18:00 to 07:00",)
    assert told.steps[0].reason == "shadow mode, recorded and not sent; taken after 1 attempt; waits for an answer"
    assert told.afterwards == "shadow mode: the operators are not told"
    without = replace(node, notifier=replace(node.notifier, policies=()))
    assert explained(without, at=evening).policies[-1].startswith("nights: was taken when the page was made")


@pytest.mark.parametrize(
    ("disposition", "verdict"),
    [("negative", "negative: nobody is paged"), ("not_eligible", "not eligible (bone kernel): nobody is paged")],
)
def test_a_study_that_is_not_positive_says_so_and_what_a_positive_would_do(
    node: Config, ledger: Ledger, disposition: str, verdict: str
) -> None:
    reasons = ("bone kernel",) if disposition == "not_eligible" else ()
    post(ledger, triaged(disposition, calling_ae_title="NORTH1", reasons=reasons))
    told = explained(node, "ACC20260329", NOON.replace(hour=19))
    assert (told.positive, told.verdict, told.site, told.mode) == (False, verdict, "north", "shadow")
    assert (told.policy, told.finding) == ("nights", "any, probability 0.50")
    (step,) = told.steps
    assert (step.state, step.recipient) == ("planned", "night@hospital.example")
    assert step.reason == "shadow mode, would be recorded and not sent; at once"


def test_a_positive_result_without_a_page_says_that_the_notifier_may_not_run(node: Config, ledger: Ledger) -> None:
    post(ledger, triaged())
    told = explained(node)
    assert told.positive
    assert "not paged yet" in told.verdict
    assert [step.state for step in told.steps] == ["planned"] * 3


def test_a_study_without_a_result_is_explained_by_the_scanner_that_sent_it(node: Config, ledger: Ledger) -> None:
    with ledger.begin() as connection:
        connection.execute(
            insert(series).values(
                series_instance_uid="1.2.3.4",
                revision=1,
                study_instance_uid="1.2.3",
                calling_ae_title="NORTH1",
                scanner="CT9",
                first_image_at=NOON,
                last_image_at=NOON,
            )
        )
    told = explained(node)
    assert (told.positive, told.verdict, told.site) == (False, "no result yet: nobody is paged", "north")
    assert [step.state for step in told.steps] == ["planned"] * 3


# --- test pages ------------------------------------------------------------------------------------------------------


def reached(config: Config, *arguments: Any) -> set[tuple[str, str]]:
    return {(target.step.channel, target.step.to) for target in targets(config, *arguments)}


def test_every_distinct_recipient_who_may_be_paged_is_a_target_and_those_in_shadow_mode_are_not(node: Config) -> None:
    live = {("smtp", f"{name}@hospital.example") for name in ("first", "third", "it")} | {("pager", "on-call:chief")}
    assert reached(node) == live
    assert reached(node, None, True) == live | {("smtp", "night@hospital.example")}
    twice = replace(node, notifier=replace(node.notifier, operators=(STEPS[0],)))
    (first,) = (target for target in targets(twice) if target.step.to == "first@hospital.example")
    assert first.of == ("notifier.steps", "notifier.operators")


def test_one_policy_is_tested_alone(node: Config) -> None:
    assert reached(node, "nights", True) == {("smtp", "night@hospital.example")}
    assert ("smtp", "it@hospital.example") not in reached(node, "notifier.steps")
    with pytest.raises(ConfigError, match=r"no policy days; known are notifier\.steps, nights"):
        targets(node, "days")


def test_in_shadow_mode_no_test_page_is_sent_unless_asked_for_all_the_same(node: Config) -> None:
    shadow = replace(node, notifier=replace(node.notifier, mode="shadow"))
    for arguments in ((), ("nights",)):
        with pytest.raises(ConfigError, match="--even-in-shadow"):
            targets(shadow, *arguments)
    with pytest.raises(ConfigError, match="--even-in-shadow"):
        targets(node, "nights")
    assert len(targets(shadow, None, True)) == 5


def test_a_node_that_pages_nobody_says_where_to_add_somebody() -> None:
    with pytest.raises(ConfigError, match=r"\[\[notifier\.steps\]\]"):
        targets(configured(), None, True)


def test_each_target_gets_a_page_that_says_it_is_a_test_and_each_failure_is_told(node: Config) -> None:
    webhook, mailbox = HttpServer(), Mailbox()
    webhook.status = 403
    steps = (
        STEPS[0],
        STEPS[1],
        PagingStep(to=f"{webhook.url}/page", channel="webhook"),
    )
    notifier = replace(
        node.notifier, steps=steps, policies=(), operators=(), webhook_secret="whsec_c2VjcmV0c2VjcmV0c2VjcmV0"
    )
    config = replace(node, notifier=notifier)
    try:
        with smtp_server(mailbox, config.notifier.smtp_port):
            outcomes = send_tests(config, targets(config))
    finally:
        webhook.close()
    by_channel = {outcome.channel: outcome for outcome in outcomes}
    assert by_channel["smtp"].ok
    assert by_channel["smtp"].duration_ms > 0
    (email,) = mailbox.emails
    assert "TEST" in email["Subject"]
    assert not by_channel["pager"].ok
    assert "nobody is on call for chief" in by_channel["pager"].error
    assert not by_channel["webhook"].ok
    assert "403" in by_channel["webhook"].error


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(node: Config, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr(cli, "_config", lambda: node)
    monkeypatch.setenv("COLUMNS", "250")
    return CliRunner()


def test_the_command_explains_as_json_and_as_a_table(command: CliRunner, node: Config, ledger: Ledger) -> None:
    paging(ledger, node).on_triaged(triaged())
    answer = command.invoke(cli.app, ["page", "--explain", "1.2.3", "--json"])
    assert answer.exit_code == 0
    (told,) = json.loads(answer.stdout)
    assert told["steps"][0]["recipient"] == "first@hospital.example"
    assert set(told) == set(asdict(explained(node)))
    answer = command.invoke(cli.app, ["page", "--explain", "1.2.3"])
    assert answer.exit_code == 0


def test_the_command_fails_for_a_study_that_is_not_known(command: CliRunner, ledger: Ledger) -> None:
    assert command.invoke(cli.app, ["page", "--explain", "1.2.3"]).exit_code == 1


@pytest.mark.parametrize("arguments", [[], ["--test", "--explain", "1.2.3"]])
def test_the_command_does_one_thing_at_a_time(command: CliRunner, arguments: list[str]) -> None:
    assert command.invoke(cli.app, ["page", *arguments]).exit_code == 2


def test_the_command_asks_before_it_sends_and_its_exit_status_tells_of_a_failure(
    command: CliRunner, node: Config
) -> None:
    mailbox = Mailbox()
    arguments = ["page", "--test", "--policy", "notifier.steps"]
    with smtp_server(mailbox, node.notifier.smtp_port):
        assert command.invoke(cli.app, arguments, input="n\n").exit_code == 1
        assert mailbox.emails == []
        answer = command.invoke(cli.app, [*arguments, "--yes", "--json"])
    outcomes = {outcome["channel"] + (" ok" if outcome["ok"] else ""): outcome for outcome in json.loads(answer.stdout)}
    assert set(outcomes) == {"smtp ok", "pager"}  # nobody is chief today
    assert answer.exit_code == 1
    assert {str(email["To"]) for email in mailbox.emails} == {"first@hospital.example", "third@hospital.example"}


def test_channels_of_explained_policies_are_opened_without_touching_the_network(node: Config) -> None:
    assert open_channels(node)(STEPS[0]).recipient == "first@hospital.example"
