"""The command line: one module per command; no other room imports from here."""
