"""How things are said to people: figures, tables, and text that no terminal obeys."""
