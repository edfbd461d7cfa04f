"""Storage SCP and series assembly: from a scanner's association to SeriesReceived."""
