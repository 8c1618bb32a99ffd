"""`python -m lowbit` is the same as the `lowbit` script."""

from .cli import main

if __name__ == "__main__":
    main()
