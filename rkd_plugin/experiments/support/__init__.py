"""What experiments need of the system: processes, files, signals, memory, threads and the terminal."""
