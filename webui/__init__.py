"""Worklist, series page and review in the browser."""
