"""One package per host; importing it needs that host."""
