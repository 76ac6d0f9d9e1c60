"""One run file, several values: the runs of a sweep one after the other, and one table of what came of them."""
