"""Small programs that run a peer in the peer's own Python: `python -m atomcli.benchmarks.drivers.NAME JOB.json`."""
