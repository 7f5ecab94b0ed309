"""`python -m atomcli` is `atom`."""

from atomcli.cli.app import main

if __name__ == "__main__":
    main()
