"""Records: tables and ids, batches of what a model takes, and the small data set that every installation has."""
