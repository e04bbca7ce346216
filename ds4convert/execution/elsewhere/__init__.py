"""Results that do not stay in the folder they are written in."""
