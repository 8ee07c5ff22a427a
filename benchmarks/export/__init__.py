"""The suite `export`: every part in every format, its checks, error, size and seconds."""
