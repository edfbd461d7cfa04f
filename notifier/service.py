"""The notifier: pages readers about positive results, and posts every result to the web UI.

Paging and posting are two consumer groups of the bus, so that a web UI that is down never holds up a page.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from herald.bus import handle, open_bus
from herald.config import Config, PagingStep, required_secret
from herald.errors import ChannelRefused, StoreError
from herald.events import Event, SeriesReviewed, SeriesTriaged, utc_now
from herald.ledger import open_ledger
from herald.store import StudyStore
from notifier import policy
from notifier.alarms import Alarms
from notifier.channels import open_channel
from notifier.channels.webui import WebuiChannel
from notifier.paging import Paging, Reach, no_pictures, nobody_on_call
from notifier.picture import key_slice
from notifier.posting import Posting
from notifier.replies import serve_replies
from notifier.roster import Roster
from notifier.watch import Watch

log = logging.getLogger(__name__)

Handlers = Mapping[type[Event], Callable[[Any], None]]

PAGING_GROUP = "notifier"
POSTING_GROUP = "notifier-webui"

CHANNELS_KEPT = 1024
"""Opened channels that are kept; rosters name new people all the time."""


def serve(config: Config, stop: threading.Event) -> None:
    """Page and post until `stop` is set; raises ConfigError when a policy, the roster or a secret is missing or wrong.

    A thread each for paging's consumer, the paging clock, posting's consumer, the operators' alarms, the watch and
    replies by e-mail, and those that send. One that dies sets `stop` and raises here, so that the process ends and is
    started again rather than half working. On stopping, pages under way are sent to their end; those that wait stay
    due in the ledger.
    """
    reach = open_channels(config)
    roster = open_roster(config)
    on_call = roster.on_call if roster else nobody_on_call
    required_secret(config.webui.secret_key, "webui.secret_key")
    webui = WebuiChannel(config)
    ledger = open_ledger(config.ledger)
    senders = Senders(config.notifier.senders)
    alarms = Alarms(ledger, config, reach, on_call=on_call)
    watch = Watch(ledger, config, alarms)
    paging = Paging(
        ledger,
        config,
        reach,
        on_call=on_call,
        submit=senders.submit,
        on_undelivered=lambda page, reason: watch.wake(),  # the watch finds in the ledger what it is about
        picture=_pictures(config),
    )
    posting = Posting(ledger, webui)

    def on_triaged(event: SeriesTriaged) -> None:
        watch.seen(event)
        paging.on_triaged(event)

    def end(_: "Future[None]") -> None:
        stop.set()
        paging.wake()

    log.info(
        "the notifier is %s; %d policies, %d sites; results go to %s",
        "live" if policy.any_live(config) else "shadow",
        len(config.notifier.policies),
        len(config.notifier.sites),
        webui.recipient,
    )
    pages: Handlers = {SeriesTriaged: on_triaged, SeriesReviewed: paging.on_reviewed}
    threads: list[Callable[[], None]] = [
        partial(paging.run, stop),
        partial(alarms.run, stop),
        partial(watch.run, stop),
        partial(_consume, config, PAGING_GROUP, pages, stop, partial(_not_paged, alarms)),
        partial(_consume, config, POSTING_GROUP, {SeriesTriaged: posting.on_triaged}, stop, _not_posted),
    ]
    if config.notifier.reply_address:
        threads.append(partial(serve_replies, config, stop))
    with ThreadPoolExecutor(len(threads), thread_name_prefix="notifier") as pool:
        work = [pool.submit(run) for run in threads]
        for future in work:
            future.add_done_callback(end)
    senders.close()
    ledger.close()
    for future in work:
        future.result()


class Senders:
    """Threads that send, `each` for every kind of channel, so that one that hangs holds up no other."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._lock = threading.Lock()
        self._pools: dict[str, ThreadPoolExecutor] = {}

    def submit(self, channel: str, work: Callable[[], None]) -> None:
        """Do the work as soon as a thread of the channel is free."""
        with self._lock:
            if channel not in self._pools:
                self._pools[channel] = ThreadPoolExecutor(self._each, thread_name_prefix=f"notifier-{channel}")
            self._pools[channel].submit(work)

    def close(self) -> None:
        """Wait for the work under way, and forget what waits."""
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)


def open_channels(config: Config) -> Reach:
    """Channels by step, opened once for each recipient, without touching the network.

    Raises ConfigError when the policies are not sound, or a channel of theirs cannot be opened.
    """
    policy.validate(config)

    @lru_cache(CHANNELS_KEPT)
    def reach(step: PagingStep) -> Any:
        return open_channel(step, config.notifier)

    for steps in policy.all_steps(config).values():
        for step in steps:
            if not step.to.startswith(policy.ON_CALL):
                reach(PagingStep(to=step.to, channel=step.channel))
    return reach


def open_roster(config: Config) -> Roster | None:
    """The roster, if there is one; raises ConfigError when it cannot be read. A role without anybody now is logged."""
    if not config.notifier.roster:
        return None
    roster = Roster(config.notifier.roster, policy.zone_of(config))
    for role in policy.roles(config):
        try:
            roster.on_call(role, utc_now())
        except ChannelRefused as error:
            log.warning("%s", error)
    return roster


def _pictures(config: Config) -> Callable[[SeriesTriaged], bytes | None]:
    """Key slices from the store; none where that cannot be opened, for a page is more than its picture."""
    if not config.notifier.picture:
        return no_pictures
    try:
        store = StudyStore(config.store)
    except StoreError as error:
        log.warning("pages have no key slice: %s", error)
        return no_pictures
    return partial(key_slice, store)


def _consume(
    config: Config,
    group: str,
    handlers: Handlers,
    stop: threading.Event,
    on_dead: Callable[[Event, BaseException], None],
) -> None:
    bus = open_bus(config.bus)
    patient = replace(config.bus, retry_for_s=math.inf)  # no outage is so long that a page or a result may be dropped
    try:
        handle(bus, group, handlers, stop, patient, on_dead)
    finally:
        bus.close()


def _not_paged(alarms: Alarms, event: Event, error: BaseException) -> None:
    if isinstance(event, SeriesTriaged) and event.disposition == "positive":
        study = event.study_instance_uid
        log.error("study %s is POSITIVE and no page could be made: %s", study, error)
        advice = "call the radiologist; then see `herald dead-letters`, mend the cause, and add --replay"
        alarms.raise_alarm("undelivered", study, f"study {study} is POSITIVE and no page could be made; {advice}")


def _not_posted(event: Event, error: BaseException) -> None:
    log.error(
        "series %s revision %d is missing on the worklist: %s; mend the cause, then replay the dead letter",
        event.series_instance_uid,
        event.revision,
        error,
    )
