"""Many runs: suites, their tables and pictures, and the time of a step."""
