"""Parts of experiments that do not use recipes: processes, files, signals, memory, threads and errors."""
