"""People compare answers in the browser: a store, a page on this machine alone, and preferences for `favor train`."""
