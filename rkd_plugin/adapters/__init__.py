"""One file per host, imported by whoever has that host."""
