"""`python -m wherefrom`, for launchers that take a module."""

from wherefrom.cli.main import main

if __name__ == "__main__":
    main()
