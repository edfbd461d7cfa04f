"""Paging with escalation, and posting of every result to the web UI."""
