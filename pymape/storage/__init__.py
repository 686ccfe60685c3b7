"""What lies on disk: files that survive crashes, folders that change in whole steps, the folder of a run."""
