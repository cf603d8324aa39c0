"""python -m chunkkv, for where the script chunkkv is not on the path."""

from chunkkv.cli.main import main

if __name__ == "__main__":
    main()
