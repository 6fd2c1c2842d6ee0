"""Tables of runs: suites, their tables and pictures, and the time of training steps."""
