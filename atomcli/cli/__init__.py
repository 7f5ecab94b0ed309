"""The command line: the only code that prints. One file per command; torch is imported inside commands only."""
