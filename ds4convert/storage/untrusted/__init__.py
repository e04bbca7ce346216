"""What a name or a file may turn out to be: links, and other things under the name of a file."""
