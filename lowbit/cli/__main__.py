"""`python -m lowbit.cli`, like `python -m lowbit`, is the same as the `lowbit` script."""

from . import main

if __name__ == "__main__":
    main()
