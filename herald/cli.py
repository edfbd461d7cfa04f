"""The command `herald`: the only place, beside `herald.node` and `herald.demo`, that knows every service."""

import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from secrets import token_urlsafe
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from herald import __version__
from herald.config import Config, load_config
from herald.errors import ConfigError, HeraldError
from herald.node import EXIT_CONFIG, SERVICES, Supervisor, run_service, stop_at_signals

if TYPE_CHECKING:
    from herald.ledger import Ledger
    from herald.send import FileOutcome

app = typer.Typer(
    help="Herald: a real-time head-CT triage node. Not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
user_app = typer.Typer(help="Who may log in to the web UI.", no_args_is_help=True)
app.add_typer(user_app, name="user")
label_app = typer.Typer(help="What others say of a study.", no_args_is_help=True)
app.add_typer(label_app, name="label")

COMMAND_LINE = "command line"
"""Address in the audit table of what was done here."""

err = Console(stderr=True)
out = Console()

_config_path: Path | None = None

Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON on stdout.")]


@app.callback(invoke_without_command=True)
def settings(
    config: Annotated[
        Path | None, typer.Option(help="herald.toml; default $HERALD_CONFIG, else ./herald.toml.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Options of every command."""
    global _config_path
    _config_path = config
    if version:
        print(f"herald {__version__}")
        raise typer.Exit()


def _config() -> Config:
    return load_config(_config_path)


@app.command()
def run(
    services: Annotated[
        list[str] | None,
        typer.Argument(help=f"Which of: {', '.join(SERVICES)}. None: all of them.", metavar="[SERVICE]..."),
    ] = None,
) -> None:
    """Run the node: all services, each a supervised process; or a single one in this process."""
    config = _config()
    names = tuple(services or SERVICES)
    for name in names:
        if name not in SERVICES:
            raise ConfigError(f"unknown service {name}; known are {', '.join(SERVICES)}")
    if len(names) == 1:
        raise typer.Exit(run_service(names[0], config))
    from herald.logs import configure_logging

    configure_logging("node", config.node.log_level)
    stop = threading.Event()
    stop_at_signals(stop)
    Supervisor(config, names).run(stop)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to put herald.toml, the secrets and the models.")] = Path(),
) -> None:
    """Write herald.toml and secrets for a new node, and export the models; changes nothing that is already there."""
    from herald.setup import initialise

    for path, what in initialise(folder, token_urlsafe):
        err.print(f"{what}: {path}")
    err.print("Next: `herald user add NAME`, edit herald.toml, `herald run`, and in another terminal `herald check`.")


@app.command()
def demo(
    dicom: Annotated[Path | None, typer.Option(help="Send these DICOM files instead of simulated ones.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Stop when every series has its disposition.")] = False,
    as_json: Json = False,
    data: Annotated[Path | None, typer.Option(help="Keep the node's data here; default a temporary folder.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for the dispositions.")] = 600.0,
) -> None:
    """Run the whole node on embedded defaults and send it head CT through a real DICOM association."""
    from herald.demo import run_demo
    from herald.logs import configure_logging

    configure_logging("demo", "info")
    for number in (signal.SIGTERM, signal.SIGINT):  # also where a shell has told background jobs to ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    raise typer.Exit(run_demo(dicom, once, as_json, data, timeout_s))


@app.command()
def send(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A DICOM file, a folder of them, or patients of a public set: ct-ich-v1:051, phe-sich:all.",
        ),
    ],
    to: Annotated[str, typer.Option(help="AE_TITLE@HOST:PORT of the receiver.")],
    calling: Annotated[str, typer.Option(help="Our AE title.")] = "HERALD-SCU",
    data: Annotated[Path, typer.Option(envvar="HERALD_DATA", help="Folder that holds the public sets.")] = Path(
        "../shared/data"
    ),
    as_json: Json = False,
) -> None:
    """Send DICOM files, or patients of a public set turned into DICOM, to a storage SCP, with a progress bar."""
    from herald.send import SendReport
    from herald.send import send as send_files

    outcomes: list[FileOutcome] = []
    with Progress(
        TextColumn(f"C-STORE to {to}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
    ) as bar:
        task = bar.add_task("send", total=0)
        for files in _series_files(what, data):
            bar.update(task, total=len(outcomes) + len(files))

            def told(done: int, _: int, before: int = len(outcomes)) -> None:
                bar.update(task, completed=before + done)

            outcomes += send_files(files, to, calling, on_progress=told).outcomes
    report = SendReport(tuple(outcomes))
    if as_json:
        _print_json(
            {
                "stored": [str(outcome.path) for outcome in report.stored],
                "failed": {str(outcome.path): outcome.error for outcome in report.failed},
                "series_instance_uids": list(dict.fromkeys(o.series_instance_uid for o in report.stored)),
            }
        )
    else:
        out.print(f"{len(report.stored)} stored, {len(report.failed)} not")
    for outcome in report.failed:
        err.print(f"[yellow]{outcome.path}: {outcome.error}")
    raise typer.Exit(1 if report.failed else 0)


def _series_files(what: str, data: Path) -> Iterator[list[Path]]:
    """The files to send: those of a folder at once, or of one patient of a public set after the other."""
    path = Path(what)
    if not path.exists() or (path / "labels.csv").is_file():
        from serving.readers import named_patients, write_patient

        patients = named_patients(what, data)
        if not patients and not path.exists():
            raise ConfigError(f"{what} is no file, no folder and no patient of a public set such as ct-ich-v1:051")
        for patient in patients:
            with TemporaryDirectory() as folder:
                yield write_patient(patient, Path(folder))
        if patients:
            return
    yield sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@app.command()
def trace(
    what: Annotated[
        str, typer.Argument(help="A SeriesInstanceUID, StudyInstanceUID, SOPInstanceUID or accession number.")
    ],
    as_json: Json = False,
) -> None:
    """Everything that happened to a series, step by step, with the latency of each."""
    from herald.trace import trace as trace_steps

    steps = trace_steps(_config(), what)
    if as_json:
        _print_json([asdict(step) for step in steps])
    else:
        _print_table(("at (UTC)", "after s", "step", "what"), (_step_row(step) for step in steps))
    if not steps:
        err.print(f"nothing is known of {what}; `herald reconcile` tells whether files are missing from the ledger")
        raise typer.Exit(1)


def _step_row(step: Any) -> tuple[str, str, str, str]:
    after = "" if step.after_s is None else f"{step.after_s:.3f}"
    return f"{step.at:%Y-%m-%d %H:%M:%S.%f}"[:-3], after, step.step, step.detail


@app.command()
def reconcile(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Restore the ledger's index from the files.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file's bytes with its SHA-256.")] = False,
    as_json: Json = False,
) -> None:
    """Account for every instance: file, ledger, series revision, disposition.

    Exit status 1 when one is unaccounted, or when a folder or file cannot be read.
    """
    from herald.reconcile import reconcile as account

    with Progress(
        TextColumn("SHA-256"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err, disable=not verify
    ) as bar:
        task = bar.add_task("verify", total=None)
        found = account(_config(), rebuild, verify, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        _print_json(asdict(found))
    else:
        for name, value in asdict(found).items():
            out.print(f"{name.replace('_', ' '):<24}{len(value) if isinstance(value, list | tuple) else value}")
        for line in found.problems:
            err.print(line, style="yellow", markup=False, soft_wrap=True)
        if found.unreadable:
            unknown = "folders or files of the store cannot be read: what else lies there is not known"
            err.print(f"[red]{found.unreadable} {unknown}", soft_wrap=True)
    raise typer.Exit(1 if found.unaccounted or found.unreadable else 0)


@app.command()
def check(as_json: Json = False) -> None:
    """Ask every part of the node whether it is well. Exit status 1 when one is not."""
    from herald.check import check as ask

    outcomes = ask(_config())
    if as_json:
        _print_json([asdict(outcome) for outcome in outcomes])
    else:
        for outcome in outcomes:
            out.print(f"{'[green]ok   [/]' if outcome.ok else '[red]FAULT[/]'} {outcome.what:<14}{outcome.detail}")
    raise typer.Exit(0 if all(outcome.ok for outcome in outcomes) else 1)


@app.command()
def page(
    explain: Annotated[
        str | None,
        typer.Option(metavar="STUDY", help="Who is or would be paged: StudyInstanceUID or accession number."),
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Send a test page through every channel.")] = False,
    policy: Annotated[
        str | None, typer.Option(help="With --test: only the steps of this policy, or of notifier.steps.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --test: do not ask first.")] = False,
    even_in_shadow: Annotated[
        bool, typer.Option("--even-in-shadow", help="With --test: send although the node or site is in shadow mode.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Who is or would be paged about a study, when and why; or a test page through every channel."""
    from herald import page as paging

    if test == (explain is not None):
        raise typer.BadParameter("use either --explain STUDY or --test")
    if explain is not None:
        found = paging.explain(_config(), explain)
        if as_json:
            _print_json([asdict(explanation) for explanation in found])
        for explanation in found if not as_json else ():
            _print_explanation(explanation)
        if not found:
            err.print(f"nothing is known of {explain}; `herald trace` takes series and instances too")
        raise typer.Exit(0 if found else 1)
    config = _config()
    targets = paging.targets(config, policy, even_in_shadow)
    if not yes:
        recipients = ", ".join(paging.recipients(config, targets))
        typer.confirm(f"Send a test page by {recipients}?", abort=True, err=True)
    outcomes = paging.send_tests(config, targets)
    if as_json:
        _print_json([asdict(outcome) for outcome in outcomes])
    else:
        _print_table(
            ("channel", "recipient", "of", "ms", "outcome"),
            ((o.channel, o.recipient, ", ".join(o.of), f"{o.duration_ms:.0f}", o.error or "ok") for o in outcomes),
        )
    raise typer.Exit(0 if all(outcome.ok for outcome in outcomes) else 1)


def _print_explanation(told: Any) -> None:
    out.print(f"study {told.study_instance_uid}: {told.verdict}", highlight=False)
    if not told.positive:
        out.print("A positive result, were there one now, would do this:")
    out.print(f"site {told.site or 'none'}, {told.mode}; {told.finding}; by {told.policy}", highlight=False)
    for line in told.policies:
        out.print(f"  {line}", highlight=False, markup=False)
    _print_table(
        ("step", "at (UTC)", "channel", "recipient", "state", "reason"),
        ((str(s.step), f"{s.at:%Y-%m-%d %H:%M:%S}", s.channel, s.recipient, s.state, s.reason) for s in told.steps),
    )
    out.print(told.afterwards, highlight=False)


@app.command(name="dead-letters")
def dead_letters(
    replay: Annotated[bool, typer.Option("--replay", help="Hand each to its service again.")] = False,
    as_json: Json = False,
) -> None:
    """Events that a service could not handle, with their error; replay them when the cause is mended."""
    from herald.bus import open_bus
    from herald.events import EVENT_TYPES

    bus = open_bus(_config().bus)
    try:
        letters = [letter for event_type in EVENT_TYPES.values() for letter in bus.dead_letters(event_type.topic)]
        if replay:
            for letter in letters:
                bus.replay(letter)
    finally:
        bus.close()
    if as_json:
        _print_json([{**asdict(letter), "message": letter.message.decode(errors="replace")} for letter in letters])
    else:
        _print_table(
            ("died at (UTC)", "topic", "group", "error"),
            ((f"{letter.died_at:%Y-%m-%d %H:%M:%S}", letter.topic, letter.group, letter.error) for letter in letters),
        )
    err.print(f"{len(letters)} dead letters" + (", all replayed" if replay and letters else ""))


@app.command()
def phantom(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the series and truth.json.")],
    n: Annotated[int, typer.Option("--n", help="How many series.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    as_json: Json = False,
) -> None:
    """Write simulated CT series as DICOM, with their truth."""
    from serving.phantom import write_phantoms

    with Progress(console=err) as bar:
        task = bar.add_task("simulating", total=n)
        truth = write_phantoms(target, n, seed, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        _print_json(truth)
    else:
        out.print(f"{len(truth)} series under {target}; truth in {target / 'truth.json'}")


@app.command()
def report(
    first: Annotated[datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="First day of the period (UTC).")],
    last: Annotated[datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="Its last day, which is included.")],
    html: Annotated[Path | None, typer.Option(help="Write the report here: one file that loads nothing.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write its figures here.")] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Walk the record's chain of hashes first, and stop where it is broken."),
    ] = False,
    head: Annotated[str, typer.Option(help="With --verify: the hash of an entry that was written down.")] = "",
    entries: Annotated[int | None, typer.Option(help="With --verify: the number of that entry.", min=1)] = None,
    readers: Annotated[
        int | None, typer.Option(help="Readers of the queue simulation; default as the record tells.", min=1)
    ] = None,
    read_minutes: Annotated[
        float | None, typer.Option(help="Mean minutes of a reading there; default as the record tells.", min=0.1)
    ] = None,
) -> None:
    """The validation report of a period, from the record. Exit status 1 when the record does not hold (--verify)."""
    from herald.validation import chain
    from herald.validation import report as validation_report
    from herald.validation.period import period

    if html is None and json_file is None and not verify:
        raise typer.BadParameter("say where the report goes: --html FILE, --json FILE, or --verify alone")
    if (head or entries) and not verify:
        raise typer.BadParameter("--head and --entries belong to --verify")
    config = _config()
    period(first.date(), last.date())
    with _ledger() as ledger:
        if verify:
            verified = chain.verify(ledger, head, entries)
            if verified.fault:
                err.print(f"[red]entry {verified.fault.entry}:[/] {verified.fault.why}", highlight=False)
                raise typer.Exit(1)
            err.print(f"{verified.entries} entries hold; head {verified.head_sha256}", highlight=False)
        if html is None and json_file is None:
            return
        with ledger.read() as connection:
            span = (first.date(), last.date())
            found = validation_report.from_record(connection, config, *span, readers, read_minutes)
    for path, text in ((html, validation_report.page), (json_file, validation_report.as_json)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(found), encoding="utf-8")
            err.print(f"written: {path}", highlight=False)


@app.command()
def export(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    file_format: Annotated[
        str | None, typer.Option("--format", help="csv or parquet; default as OUT is called.")
    ] = None,
    first: Annotated[
        datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="First day (UTC); default all.")
    ] = None,
    last: Annotated[
        datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="Last day, which is included.")
    ] = None,
    salt: Annotated[
        Path | None, typer.Option(help="File with another salt than validation.salt, for other pseudonyms.")
    ] = None,
) -> None:
    """Write the validation record as a flat table without identity; docs/validation-schema.md tells its columns."""
    from herald.validation import chain
    from herald.validation import export as validation_export
    from herald.validation.period import period

    found = file_format or target.suffix.removeprefix(".")
    if found not in validation_export.FORMATS:
        raise typer.BadParameter(f"say --format csv or --format parquet, not {found!r}")
    config = _config()
    secret = validation_export.read_salt(salt) if salt else config.validation.salt
    validation_export.pseudonymise(secret)  # says what is missing before the record is read
    start = period(first.date(), first.date())[0] if first else None
    end = period(last.date(), last.date())[1] if last else None
    with _ledger() as ledger, ledger.read() as connection:
        rows = chain.latest(connection, start, end)
    validation_export.export(rows, target, found, secret)
    err.print(f"written: {target}, {len(rows)} rows", highlight=False)


@user_app.command("add")
def user_add(
    name: Annotated[str, typer.Argument(help="Log-in name.")],
    role: Annotated[str, typer.Option(help="reader, researcher or admin.")] = "reader",
    password: Annotated[
        str, typer.Option(prompt=True, confirmation_prompt=True, hide_input=True, help="Asked for when not given.")
    ] = "",
) -> None:
    """Add a reader, or change the password and role of one."""
    from webui.record import add_audit
    from webui.users import add_user

    with _ledger() as ledger:
        add_user(ledger, name, password, role)
        add_audit(ledger, name, COMMAND_LINE, f"user-add-{role}")
    out.print(f"{name} may log in as {role}", highlight=False, markup=False)


@user_app.command("list")
def user_list(as_json: Json = False) -> None:
    """Who may log in, with which role, and how."""
    from webui.users import list_users

    with _ledger() as ledger:
        found = list_users(ledger)
    if as_json:
        _print_json([asdict(account) for account in found])
    else:
        _print_table(
            ("name", "role", "log-in", "since (UTC)"),
            ((escape(a.name), a.role, a.log_in, f"{a.created_at:%Y-%m-%d %H:%M}") for a in found),
        )
    if not found:
        err.print("nobody may log in; `herald user add NAME --role admin` adds the first administrator")


@user_app.command("remove")
def user_remove(
    name: Annotated[str, typer.Argument(help="Log-in name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
) -> None:
    """Remove somebody, whose sessions end at once; what they reviewed stays."""
    from webui.record import add_audit
    from webui.users import UserError, list_users, remove_user

    with _ledger() as ledger:
        accounts = list_users(ledger)
        roles = {account.name: account.role for account in accounts}
        last = roles.get(name) == "admin" and list(roles.values()).count("admin") == 1
        if last and not yes:
            raise UserError(
                f"{name} is the last administrator: without one nobody can replay dead letters in the web UI. Add "
                "another by `herald user add NAME --role admin` first, or remove this one all the same with --yes"
            )
        if name in roles and not yes:
            typer.confirm(f"Remove {name} ({roles[name]})? Their sessions end now.", abort=True, err=True)
        remove_user(ledger, name)
        add_audit(ledger, name, COMMAND_LINE, "user-remove")
    out.print(f"{name} may not log in any more", highlight=False, markup=False)
    if any(account.name == name and account.log_in != "password" for account in accounts):
        err.print("the OpenID Connect provider can let them in again: take the role away there too")
    if last:
        err.print("no administrator is left; `herald user add NAME --role admin` adds one")


@contextmanager
def _ledger() -> Iterator["Ledger"]:
    from herald.ledger import open_ledger

    ledger = open_ledger(_config().ledger)
    try:
        yield ledger
    finally:
        ledger.close()


@label_app.command("import")
def label_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV of accession, source and label, or report.")],
    strict: Annotated[bool, typer.Option("--strict", help="Import nothing where a line is bad.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Import answers to whether a study shows haemorrhage: 1 or 0 as label, or the report's text, read by rule.

    The text itself is not kept. The same file again changes nothing; a source that says something else than before
    supersedes itself.
    """
    from herald.events import utc_now
    from herald.ledger import open_ledger
    from herald.validation.labels import import_labels

    ledger = open_ledger(_config().ledger)
    try:
        with Progress(TextColumn("labels"), BarColumn(), MofNCompleteColumn(), console=err, transient=True) as bar:
            task = bar.add_task("import", total=None)
            done = import_labels(
                ledger,
                file,
                utc_now(),
                strict=strict,
                dry_run=dry_run,
                on_progress=lambda count, total: bar.update(task, completed=count, total=total),
            )
    finally:
        ledger.close()
    if as_json:
        _print_json(asdict(done))
    else:
        counts = {name: value for name, value in asdict(done).items() if isinstance(value, int)}
        facts = ", ".join(f"{value} {name}" for name, value in counts.items())
        out.print(f"{'would be ' if dry_run else ''}{facts}, {len(done.bad)} bad lines", highlight=False)
    if done.ignored_columns:
        err.print(f"ignored columns: {', '.join(done.ignored_columns)}", highlight=False, markup=False)
    for bad in done.bad:
        err.print(f"line {bad.line}: {bad.why}", highlight=False, markup=False)


def _print_json(facts: object) -> None:
    print(json.dumps(facts, indent=2, default=_plain))


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _print_table(titles: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(*titles)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def main() -> None:
    """Run the command; an error that Herald raised on purpose is one line and an exit status, not a traceback."""
    try:
        app()
    except ConfigError as error:
        err.print(f"[red]configuration:[/] {error}", highlight=False)
        sys.exit(EXIT_CONFIG)
    except HeraldError as error:
        err.print(f"[red]{type(error).__name__}:[/] {error}", highlight=False)
        sys.exit(1)
