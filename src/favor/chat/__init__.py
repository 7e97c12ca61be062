"""`favor chat`: a run before and after, side by side in the browser; a vote is a labelled preference."""
