"""A server for the DIMSE-N services of the receiver: its own transport with a test's handlers and no C-STORE."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pynetdicom import AE, evt

from receiver.upper_layer import ReceivingAssociation, ReceivingServer

VERIFICATION = "1.2.840.10008.1.1"


class _NoStorage:
    def refusal(self, association: ReceivingAssociation) -> str | None:
        return None

    def begin(self, *arguments: Any) -> Any:
        raise NotImplementedError("no storage SOP class is offered here")

    def ended(self, association: ReceivingAssociation) -> None:
        """No series is open here."""


@contextmanager
def serving(abstract_syntaxes: Iterable[str], *handlers: tuple[evt.EventType, Callable[..., Any]]) -> Iterator[int]:
    """A receiver that serves these SOP classes and C-ECHO, for the block; its port."""
    ae = AE(ae_title="HERALD")
    for uid in (*abstract_syntaxes, VERIFICATION):
        ae.add_supported_context(uid)
    ae.network_timeout = 20
    server = ReceivingServer(ae, ("127.0.0.1", 0), _NoStorage(), ae.supported_contexts, list(handlers))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.stop(5.0)
        thread.join(5.0)
