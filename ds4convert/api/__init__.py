"""What the commands do, as functions: values in, values out. Nothing here prints, parses a command line, or exits.

`import ds4convert` offers these functions by name; each command is one of them between a parser and a printer.
"""
