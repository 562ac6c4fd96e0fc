"""`python -m deploy` is `paramserver`."""

from deploy.cli import main

main()
