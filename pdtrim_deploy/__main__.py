"""`python -m pdtrim_deploy` is the command line."""

from pdtrim_deploy.cli import main

main()
