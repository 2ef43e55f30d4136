"""From settings to a running process, and what is done once and without one."""
