"""What the services of Herald share: contracts, store, ledger, bus, configuration and the command line."""

__version__ = "0.1.0"
