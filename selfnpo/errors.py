"""What goes wrong through no fault of the program: one sentence for the user and exit code 2, never a traceback."""


class UserError(Exception):
    """Says what was got, what was expected and how to fix it, in one sentence."""
