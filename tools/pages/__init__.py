"""The report and the page of `serve` in a real browser: pictures of them for docs/, and what has to hold of them."""
