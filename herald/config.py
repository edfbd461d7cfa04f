"""Configuration: one frozen dataclass per table of herald.toml, defaults stated here and nowhere else.

Precedence: defaults < herald.toml < environment (`HERALD_RECEIVER__AE_TITLE=CT1`). Relative paths are relative to
`node.data_dir`. Secrets have no default; a value `file:PATH` is read from that file.
"""

import difflib
import hashlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from herald.errors import ConfigError

ENVIRONMENT_PREFIX = "HERALD_"
SECRET_PREFIX = "file:"


@dataclass(frozen=True)
class NodeConfig:
    """The node as a whole."""

    data_dir: Path = Path("herald-data")
    """Folder under which relative paths of the other tables lie."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    stop_timeout_s: float = 15.0
    """How long a service may take to finish its work after Ctrl-C before it is killed."""


@dataclass(frozen=True)
class ReceiverConfig:
    """Storage SCP and series assembly."""

    ae_title: str = "HERALD"
    host: str = "0.0.0.0"
    port: int = 11112
    tls_port: int = 0
    """A second port, with TLS (PS3.15 B.9); 0 is none."""
    tls_certificate: str = ""
    """PEM file of the certificate and its chain, relative to the data folder."""
    tls_key: str = ""
    """PEM file of the certificate's private key."""
    tls_client_ca: str = ""
    """PEM file of authorities; a sender must then show a certificate of theirs."""
    max_pdu_bytes: int = 131072
    """Longest PDU that senders are asked for; a longer one aborts its association. 0 is any length."""
    max_associations: int = 50
    allowed_senders: tuple[str, ...] = ()
    """Who may send: `AE_TITLE`, `AE_TITLE@NETWORK` or `*@NETWORK`, as in `CT1@10.0.0.0/24`; empty allows all."""
    require_called_ae_title: bool = False
    """Refuse associations that call another AE title than ours."""
    network_timeout_s: float = 60.0
    """An association silent for so long, or that takes so long over one PDU, is aborted; what was stored stays."""
    commitment_peers: tuple[str, ...] = ()
    """`AE_TITLE@HOST:PORT` of senders that take storage commitment reports over an association of their own."""
    settle_s: float = 0.7
    """How long an even, gap-free, released series rests before it is closed, until its sender is known."""
    settle_min_s: float = 0.3
    """Shortest rest, for a sender that has shown no gaps."""
    settle_max_s: float = 5.0
    """Longest rest, for a sender that pauses between the associations of a series."""
    quiet_s: float = 15.0
    """How long any other series must be quiet before it is closed."""
    min_even_slices: int = 8
    """Fewest slices with which even spacing counts as complete; fewer wait for the quiet period."""


@dataclass(frozen=True)
class StoreConfig:
    """DICOM files on disk."""

    root: Path = Path("store")
    min_free_gb: float = 2.0
    """Below so much free disk the receiver answers `out of resources`."""
    keep_days: float = 0.0
    """Studies finished for so long are removed; 0 keeps them until the disk needs the space."""
    remove_below_gb: float = 5.0
    """Below so much free disk the oldest finished studies are removed; 0 removes none."""


@dataclass(frozen=True)
class LedgerConfig:
    """The relational record."""

    url: str = "sqlite:///ledger.sqlite"
    """SQLAlchemy URL; PostgreSQL is `postgresql+psycopg://user@host/herald`."""


@dataclass(frozen=True)
class BusConfig:
    """The event bus."""

    url: str = "sqlite:///bus.sqlite"
    """`sqlite:///FILE` on one host, or `kafka://HOST:PORT[,HOST:PORT][/PREFIX]` (of topics and groups)."""
    retry_for_s: float = 600.0
    """How long a retriable error is retried before the event becomes a dead letter."""
    retry_first_s: float = 0.5
    """First pause before a retry; it doubles each time up to 30 s."""
    most_attempts: int = 5
    """How often an event is begun whose process ends in the midst of it, before it becomes a dead letter.

    On Kafka it may be once more, see `herald.bus.kafka`.
    """


@dataclass(frozen=True)
class RouterConfig:
    """Protocol identification, eligibility and detection."""

    serving_address: str = "127.0.0.1:8500"
    """gRPC address of the embedded model server or of a TensorFlow Serving GPU server."""
    deadline_s: float = 60.0
    """Longest wait for one answer of the model server."""
    min_slices: int = 8
    """Fewer slices than this are not a head scan."""
    most_images: int = 2000
    """More images than this are not a head scan and not read: a head at 0.3 mm has about 700, a perfusion thousands."""
    certain_probability: float = 0.75
    """A protocol answer below this is uncertain: the series is analysed all the same and marked."""
    analyse_uncertain: bool = True
    """Analyse a series whose protocol is uncertain; false makes it not eligible."""
    operating_point: float = 0.5
    """Study probability of any haemorrhage from which a series is positive."""
    slab_thickness_mm: float = 5.0
    """Thinner slices are averaged to slabs of this thickness before detection."""


@dataclass(frozen=True)
class ServingConfig:
    """The embedded model server."""

    host: str = "127.0.0.1"
    port: int = 8500
    models: Path = Path("models")
    """Folder of SavedModels: NAME/VERSION/saved_model.pb; relative to the data folder."""
    executor: Literal["openvino", "tensorflow"] = "openvino"
    precision: Literal["auto", "f32", "bf16"] = "auto"
    """`auto` is f32, or bf16 where the CPU is clearly quicker in it: tried with each model as it is loaded."""
    threads: int = 2
    poll_s: float = 5.0
    """How often the folder is looked at for new versions."""


ChannelName = Literal["smtp", "pager", "webhook", "hl7", "apprise"]


@dataclass(frozen=True)
class PagingStep:
    """One step of a paging policy: whom to page, and how long after the finding."""

    to: str
    """E-mail address for `smtp` and `pager`, URL for `webhook` and `apprise`, HOST:PORT for `hl7`; `on-call:ROLE`."""
    channel: ChannelName = "smtp"
    """`smtp` is an e-mail with the key slice, `pager` one of 160 characters for an e-mail-to-pager gateway."""
    after_minutes: float = 0.0


@dataclass(frozen=True)
class PagingPolicy:
    """Steps for some results only: the first policy that fits is used, `notifier.steps` where none does."""

    name: str
    steps: tuple[PagingStep, ...]
    sites: tuple[str, ...] = ()
    """Names of [[notifier.sites]]; empty fits all."""
    findings: tuple[str, ...] = ()
    """Leading kinds of bleed, as in `edh_sdh`; empty fits all."""
    probability_from: float = 0.0
    """Least probability of any haemorrhage that fits."""
    probability_below: float = 1.01
    """First probability that no longer fits."""
    days: tuple[str, ...] = ()
    """Days on which its hours begin, `mon` to `sun`; empty fits all."""
    from_time: str = "00:00"
    """Local time of day at which it begins to hold."""
    until_time: str = "24:00"
    """Local time of day at which it ends; earlier than `from_time` is on the next day."""


@dataclass(frozen=True)
class PagingSite:
    """Scanners that belong together: a mode of their own, and a name for policies."""

    name: str
    calling_ae_titles: tuple[str, ...] = ()
    scanners: tuple[str, ...] = ()
    """Station names (0008,1010)."""
    mode: Literal["", "shadow", "live"] = ""
    """Empty is `notifier.mode`."""


@dataclass(frozen=True)
class NotifierConfig:
    """Paging, and posting of results to the web UI."""

    mode: Literal["shadow", "live"] = "shadow"
    """`shadow` records what would have been sent; `live` sends. A site may differ."""
    steps: tuple[PagingStep, ...] = ()
    """Whom to page, in order; each later step fires only while nobody has acknowledged."""
    policies: tuple[PagingPolicy, ...] = ()
    """Other steps for some sites, bleeds, probabilities and hours."""
    sites: tuple[PagingSite, ...] = ()
    """Groups of scanners with a mode or policies of their own."""
    roster: str = ""
    """Who is on call: an iCalendar (.ics) or CSV file, relative to the data folder; read anew when it changes."""
    time_zone: str = ""
    """IANA name for hours of policies and the roster's times without a zone; empty is this host's zone."""
    senders: int = 8
    """Pages sent at the same time by each kind of channel, so that a slow one holds up no other page."""
    smtp_host: str = "127.0.0.1"
    smtp_port: int = 25
    smtp_starttls: bool = False
    smtp_tls: bool = False
    """TLS from the first byte (usually port 465) instead of STARTTLS."""
    smtp_user: str = ""
    smtp_password: str = ""
    """Secret; `file:PATH` reads it from a file."""
    smtp_timeout_s: float = 10.0
    sender: str = "herald@localhost"
    picture: bool = True
    """Show the key slice in e-mails of channel `smtp`; it carries no identity."""
    webhook_secret: str = ""
    """Secret that signs webhooks (Standard Webhooks); `file:PATH` reads it from a file."""
    hl7_receiver: str = "RIS"
    """Receiving application (MSH-5) of HL7 messages."""
    reply_address: str = ""
    """Address, as in `herald@hospital.example`, to which a page may be answered by e-mail; empty is off."""
    reply_host: str = "127.0.0.1"
    """Where the replies are taken: mail for `reply_address` is routed here by SMTP."""
    reply_port: int = 8025
    retry_for_s: float = 300.0
    """How long a channel that cannot be reached is retried before the next step is used at once."""
    exhausted_after_minutes: float = 15.0
    """How long after the last step's page nobody may acknowledge before the operator is told."""
    operators: tuple[PagingStep, ...] = ()
    """Whom to tell of a page that reached nobody, of silence and of a dead model server: all at once."""
    silence_minutes: float = 0.0
    """How long no series may be triaged before the operators are told; 0 is off."""
    models_silent_minutes: float = 5.0
    """How long the model server may not answer, or the router not live, before the operators are told; 0 is off."""
    heartbeat_at: str = ""
    """Local time of day, as in `08:00`, of a daily message to the operators that paging works; empty is off."""
    webui_url: str = "http://127.0.0.1:8080"
    """Where results are posted, and the start of the link in a page unless `webui.public_url` is set."""


@dataclass(frozen=True)
class WebuiConfig:
    """The web UI."""

    host: str = "127.0.0.1"
    port: int = 8080
    public_url: str = ""
    """How readers reach the web UI; empty means `notifier.webui_url`."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of reverse proxies that tell a reader's address by X-Forwarded-For."""
    token: str = ""
    """Secret with which the notifier posts results; `file:PATH` reads it from a file."""
    secret_key: str = ""
    """Secret that signs sessions and links; `file:PATH` reads it from a file."""
    session_hours: float = 12.0
    link_hours: float = 72.0
    """How long the link in a page is valid."""
    blind_fraction: float = 0.0
    """Share of series whose reader judges before the prediction is shown, in live mode too; 1 is all of them."""
    oidc_issuer: str = ""
    """OpenID Connect provider, as in `https://login.hospital.example/realms/staff`; empty is off."""
    oidc_client_id: str = ""
    oidc_client_secret: str = ""
    """Secret; `file:PATH` reads it from a file."""
    oidc_claim: str = "groups"
    """Claim of the ID token that decides about the role."""
    oidc_roles: tuple[str, ...] = ()
    """`VALUE=ROLE` pairs, as in `radiology=reader`; the first that fits decides, and who has none may not log in."""


@dataclass(frozen=True)
class ValidationConfig:
    """The record for prospective validation, its report and its export."""

    salt: str = ""
    """Secret with which exports hash identifiers; `file:PATH` reads it from a file."""
    unfinished_minutes: float = 60.0
    """How long a complete series may have no result before it is recorded as unfinished."""
    reference_days: float = 28.0
    """First days of a report: inputs and scores of later days are compared with theirs."""
    window_days: float = 7.0
    """How many days are compared with the reference at a time."""


@dataclass(frozen=True)
class MetricsConfig:
    """Prometheus metrics, for each service at `/metrics` of a port of its own; they carry no identity."""

    host: str = "127.0.0.1"
    port: int = 0
    """Port of the receiver; router, serving, notifier and webui have the next four. 0 is off."""


@dataclass(frozen=True)
class Config:
    """Every setting of the node."""

    node: NodeConfig = field(default_factory=NodeConfig)
    receiver: ReceiverConfig = field(default_factory=ReceiverConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    bus: BusConfig = field(default_factory=BusConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    notifier: NotifierConfig = field(default_factory=NotifierConfig)
    webui: WebuiConfig = field(default_factory=WebuiConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


SECRETS = (
    ("notifier", "smtp_password"),
    ("notifier", "webhook_secret"),
    ("webui", "token"),
    ("webui", "secret_key"),
    ("webui", "oidc_client_secret"),
    ("validation", "salt"),
)


_RECEIVER_FILES = ("tls_certificate", "tls_key", "tls_client_ca")


def load_config(path: Path | None = None, environment: Mapping[str, str] | None = None) -> Config:
    """Read `path` (default: $HERALD_CONFIG, else ./herald.toml when there is one) and the environment.

    Raises ConfigError that names the setting, what is wrong with it and the nearest known name.
    """
    environment = os.environ if environment is None else environment
    tables = _read_file(path, environment)
    for name, text in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or "__" not in name:
            continue
        table, _, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        target = tables.setdefault(table, {})
        target[key] = _from_text(table, key, text)
    return _resolved(_convert(tables))


def version(config: Config) -> str:
    """Twelve digits that change with whatever setting may change a decision or a page, and name no secret."""
    deciding = (config.receiver, config.router, config.serving, config.notifier)
    settings = msgspec.to_builtins(deciding, enc_hook=str)
    for table, settings_of_table in zip(("receiver", "router", "serving", "notifier"), settings, strict=True):
        for owner, key in SECRETS:
            if owner == table:
                del settings_of_table[key]
    return hashlib.sha256(msgspec.json.encode(settings, order="deterministic")).hexdigest()[:12]


def required_secret(value: str, setting: str) -> str:
    """The secret, or ConfigError that says how to give it."""
    if value:
        return value
    variable = ENVIRONMENT_PREFIX + setting.upper().replace(".", "__")
    raise ConfigError(
        f"{setting} has no default: run `herald init` once, or set {variable} (a value file:PATH is read)"
    )


def _read_file(path: Path | None, environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if path is None and environment.get("HERALD_CONFIG"):
        path = Path(environment["HERALD_CONFIG"])
    if path is None:
        path = Path("herald.toml")
        if not path.exists():
            return {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} stands outside a table; known tables are {', '.join(_names(Config))}")
    return tables


def _names(cls: Any) -> list[str]:
    return [f.name for f in fields(cls)]


def _unknown(kind: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1, cutoff=0.0)
    return ConfigError(f"unknown {kind} {name}; did you mean {near[0]}?")


def _table_type(table: str) -> Any:
    for f in fields(Config):
        if f.name == table:
            return f.type
    raise _unknown("table", table, _names(Config))


def _from_text(table: str, key: str, text: str) -> Any:
    """An environment value as the setting's type: lists are comma-separated, tables of tables are JSON."""
    for f in fields(_table_type(table)):
        if f.name == key:
            if get_origin(f.type) is tuple:
                if is_dataclass(get_args(f.type)[0]):
                    try:
                        return msgspec.json.decode(text)
                    except msgspec.MsgspecError as error:
                        raise ConfigError(f"{table}.{key} must be a JSON list in the environment: {error}") from error
                return [part.strip() for part in text.split(",") if part.strip()]
            if f.type is bool:
                return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(
                    text.lower(), text
                )
            return text
    raise _unknown("setting", f"{table}.{key}", _names(_table_type(table)))


def _convert(tables: Mapping[str, dict[str, Any]]) -> Config:
    built: dict[str, Any] = {}
    for table, values in tables.items():
        cls = _table_type(table)
        _refuse_unknown(table, cls, values)
        try:
            built[table] = msgspec.convert(values, cls, strict=False, dec_hook=_path)
        except msgspec.ValidationError as error:
            text = str(error).replace("$.", f"{table}.")
            raise ConfigError(f"{text}; see deploy/herald.toml for every setting and its unit") from error
    return Config(**built)


def _refuse_unknown(name: str, cls: Any, values: object) -> None:
    """Raise ConfigError at the first key that a table, or a table within it, does not have."""
    if not isinstance(values, dict):
        return  # msgspec says what is wrong
    types = {f.name: f.type for f in fields(cls)}
    for key, value in values.items():
        if key not in types:
            raise _unknown("setting", f"{name}.{key}", list(types))
        within = get_args(types[key])[0] if get_origin(types[key]) is tuple else None
        if is_dataclass(within) and isinstance(value, list):
            for table in value:
                _refuse_unknown(f"{name}.{key}", within, table)


def _path(expected: type, value: object) -> object:
    if expected is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(expected)  # how msgspec is told that a hook does not know a type


def _resolved(config: Config) -> Config:
    """Make paths absolute and read secrets from their files."""
    data_dir = config.node.data_dir.expanduser().absolute()
    config = replace(
        config,
        node=replace(config.node, data_dir=data_dir),
        store=replace(config.store, root=data_dir / config.store.root),
        serving=replace(config.serving, models=data_dir / config.serving.models),
        ledger=replace(config.ledger, url=_resolved_url(config.ledger.url, data_dir)),
        bus=replace(config.bus, url=_resolved_url(config.bus.url, data_dir)),
        receiver=replace(config.receiver, **_resolved_files(config.receiver, data_dir)),
        notifier=replace(
            config.notifier, roster=str(data_dir / config.notifier.roster) if config.notifier.roster else ""
        ),
        webui=replace(config.webui, public_url=config.webui.public_url or config.notifier.webui_url),
    )
    for table, key in SECRETS:
        value: str = getattr(getattr(config, table), key)
        if value.startswith(SECRET_PREFIX):
            path = data_dir / value.removeprefix(SECRET_PREFIX)
            try:
                secret = path.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigError(f"{table}.{key}: cannot read the secret file {path}: {error.strerror}") from error
            config = replace(config, **{table: replace(getattr(config, table), **{key: secret})})
    return config


def _resolved_files(config: ReceiverConfig, data_dir: Path) -> dict[str, Any]:
    return {key: str(data_dir / file) for key in _RECEIVER_FILES if (file := getattr(config, key))}


def _resolved_url(url: str, data_dir: Path) -> str:
    prefix = "sqlite:///"
    if not url.startswith(prefix):
        return url
    return prefix + str(data_dir / url.removeprefix(prefix))
