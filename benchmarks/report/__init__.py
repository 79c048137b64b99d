"""AdapterCache, plots and pages written from result rows."""
