"""Prospective validation: an append-only record of every series revision, its labels, its report and its export."""
