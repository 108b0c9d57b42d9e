"""Reports of runs: what they measured, drawn and put on one HTML page."""
