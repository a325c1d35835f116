"""`python -m infotok_lit`."""

from infotok_lit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
