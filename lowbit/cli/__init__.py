"""Command line of lowbit: `lowbit info | finetune | generate | merge`.

Nothing heavy is imported here, so that `lowbit --help` answers at once; torch and transformers are
imported by the command that needs them.
"""


def main() -> None:
    """Run the command line; the entry point of the `lowbit` script."""
    from .app import run

    run()
