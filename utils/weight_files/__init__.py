"""Weight files of others, read as plain data; nothing of a file is run."""
