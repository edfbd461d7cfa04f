"""The errors of Herald.

HeraldError
├── ConfigError             a setting is unknown, ill-typed or missing
├── BusError                the bus cannot be reached or refuses            (retriable)
│   └── EventDecodeError    a message is not one of our events
├── NeverFinished           an event ended the process of its handler each time
├── LedgerError             the relational record cannot be reached         (retriable)
├── StoreError              files cannot be written or read                 (retriable)
│   └── StoreFullError      less disk is free than the watermark            (retriable)
├── DicomError              something is wrong with what was sent
│   ├── NotDicomError       a file is not DICOM
│   └── VolumeError         the instances of a series do not make a volume
│       └── PixelDataError  pixel data are missing or cannot be decoded
├── ServingError            the model server answered with an error
│   ├── ServingUnavailable  the model server cannot be reached or is busy   (retriable)
│   └── SignatureMismatch   a model does not have the expected signature
├── LinkError               a link in a page is forged, damaged or expired
└── NotificationError       a channel refused or could not be reached
    ├── ChannelUnavailable  try again later                                 (retriable)
    └── ChannelRefused      trying again would not help
"""

from typing import ClassVar


class HeraldError(Exception):
    """Base of every error that Herald raises on purpose; `retriable` says whether trying again may help."""

    retriable: ClassVar[bool] = False


class ConfigError(HeraldError):
    """Raised when a setting is unknown, ill-typed or missing."""


class BusError(HeraldError):
    """Raised when the bus cannot be reached or refuses an operation."""

    retriable = True


class EventDecodeError(BusError):
    """Raised when a message on the bus is not one of our events."""

    retriable = False


class NeverFinished(HeraldError):
    """Told of an event whose handler was begun again and again, and each time its process ended."""


class LedgerError(HeraldError):
    """Raised when the ledger's database cannot be reached or refuses a statement."""

    retriable = True


class StoreError(HeraldError):
    """Raised when the study store cannot write or read a file."""

    retriable = True


class StoreFullError(StoreError):
    """Raised before a write when less disk is free than the watermark allows."""


class DicomError(HeraldError):
    """Raised when something is wrong with what a sender gave us; sending it again unchanged will not help."""


class NotDicomError(DicomError):
    """Raised when a file is not a DICOM data set."""


class VolumeError(DicomError):
    """Raised when the instances of a series cannot be put together as one volume."""


class PixelDataError(VolumeError):
    """Raised when pixel data are missing or cannot be decoded."""


class ServingError(HeraldError):
    """Raised when the model server answers with an error that a retry will not cure."""


class ServingUnavailable(ServingError):
    """Raised when the model server cannot be reached, is loading, overloaded or too slow."""

    retriable = True


class SignatureMismatch(ServingError):
    """Raised when a served model's inputs or outputs differ from `herald.signatures`."""


class LinkError(HeraldError):
    """Raised when the link in a page is forged, damaged or expired."""


class NotificationError(HeraldError):
    """Raised when a notification did not go out."""


class ChannelUnavailable(NotificationError):
    """Raised when a channel cannot be reached or asks to try later."""

    retriable = True


class ChannelRefused(NotificationError):
    """Raised when a channel refuses for good, so that only another channel or the operator can help."""
