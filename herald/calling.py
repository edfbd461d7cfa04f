"""Associations that we ask for: pynetdicom's, with two faults of its sockets mended."""

from typing import Any, cast

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.transport import AddressInformation, AssociationSocket


class CallingEntity(AE):
    """An application entity to associate from: a refusal is told as such, and no socket stays open."""

    def _create_socket(self, assoc: Association, address: AddressInformation, tls_args: Any) -> AssociationSocket:
        connection = _CallingSocket(assoc, address=address)
        connection.tls_args = tls_args
        return connection


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
