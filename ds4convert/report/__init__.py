"""For people: facts as text and as a page."""
