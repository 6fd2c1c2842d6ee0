"""Parts of experiments that know nothing of recipes: processes, files, signals, memory, threads and errors."""
