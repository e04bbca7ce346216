"""`python -m tests.hub FOLDER`."""

from tests.hub.server import main

main()
