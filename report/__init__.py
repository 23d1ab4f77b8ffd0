"""One page that tells the whole story of a run, or compares several runs."""
