"""`python -m tests.local_hub FOLDER`."""

from tests.local_hub.server import main

main()
