"""Runs the tasks of a job, one a shard or a class: in this process, in others, on other machines."""
