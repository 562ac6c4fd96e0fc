"""Where the parts come together: the command line, a whole run on one machine, and the report of a run."""
