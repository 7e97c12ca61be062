"""`favor watch`: the report of a run in the browser, which follows what the run writes."""
