"""Kill, stop and break processes of a live application while streams run."""
