"""Associations that we ask for: pynetdicom's, with three of its faults mended."""

from functools import partial
from typing import Any, cast

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.transport import AddressInformation, AssociationSocket


class CallingEntity(AE):
    """An application entity to associate from: refusals are told as such, answers arrive, and no socket stays open."""

    def _create_socket(self, assoc: Association, address: AddressInformation, tls_args: Any) -> AssociationSocket:
        # AE makes its associations itself and takes no class for them
        assoc._serve_request = partial(_leave_answers, assoc, assoc._serve_request)  # type: ignore[method-assign]
        connection = _CallingSocket(assoc, address=address)
        connection.tls_args = tls_args
        return connection


def _leave_answers(association: Association, serve: Any, message: Any, context_id: int) -> None:
    """Leave an answer to the thread that waits for it.

    pynetdicom's own thread of an association is to pause while another one asks and waits, but may take the answer if
    it was slow to see that; then nobody would have it, and a file that was stored would be told as failed.
    """
    if message.is_valid_request or association._reactor_checkpoint.is_set():  # set: nobody waits
        serve(message, context_id)
    else:
        association.dimse.msg_queue.put((context_id, message))


def reached(association: Association) -> bool:
    """Whether the other end of an association that a CallingEntity asked for was ever connected."""
    return cast(_CallingSocket, association.dul.socket).reached


class _CallingSocket(AssociationSocket):
    """The socket of one association that we ask for."""

    reached = False

    @property
    def _is_connected(self) -> bool:
        """`reached`, where pynetdicom's own goes back to False.

        pynetdicom looks here whether the connection failed, in another thread than the one that reads the answer; a
        connection that was refused and closed by then would count as never made, and the refusal would be lost.
        """
        return self.reached

    @_is_connected.setter
    def _is_connected(self, connected: bool) -> None:
        self.reached = self.reached or connected

    def _shutdown_socket(self) -> None:
        """Close it also when its other end is gone or was never there."""
        super()._shutdown_socket()
        if self.socket is not None:
            self.socket.close()
