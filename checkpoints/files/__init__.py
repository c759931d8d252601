"""Places on disk or behind URLs, files and folders that appear whole, threads within a bound on memory, progress."""
