"""What a command line is made of, whatever the command: the group, defaults in the environment, completion, colour."""
