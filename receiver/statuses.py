"""The statuses of a C-STORE response, by name (PS3.4 B.2.3, PS3.7 9.1.1.1.9 and annex C)."""

from enum import IntEnum


class StoreStatus(IntEnum):
    """What the sender is told of one instance; only SUCCESS means that it is durable here."""

    SUCCESS = 0x0000
    OUT_OF_RESOURCES = 0xA700
    """Refused: the disk is full or cannot be written; sending it again later will help."""
    DATA_SET_DOES_NOT_MATCH_SOP_CLASS = 0xA900
    """The data set contradicts the command: another SOP class or another SOP instance."""
    CANNOT_DECODE = 0xC000
    """Cannot understand (C000 to CFFF): the bytes are no data set of the negotiated transfer syntax."""
    NO_STUDY_INSTANCE_UID = 0xC001
    NO_SERIES_INSTANCE_UID = 0xC002
    NO_SOP_INSTANCE_UID = 0xC003
    INVALID_UID = 0xC004
    """A UID is longer than 64 characters or not made of digits and points (PS3.5 9.1)."""
    UNEXPECTED_ERROR = 0xC0FF
    """A fault of this receiver, with a traceback in its log."""

    @property
    def words(self) -> str:
        """The name as words, with the code."""
        return f"0x{self:04X} {self.name.lower().replace('_', ' ')}"
