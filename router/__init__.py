"""Protocol identification, eligibility and detection: from SeriesReceived to SeriesTriaged."""
