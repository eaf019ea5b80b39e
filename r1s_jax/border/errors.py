"""The errors that are the user's to mend; anything else that is raised is a bug of ours."""


class UserError(Exception):
    """Something outside of the program is not as it must be; the message says what to do.

    A command shows the message and nothing else. Every error of this kind derives from here, and
    nothing does that the user cannot mend.
    """


class ConfigError(UserError, ValueError):
    """A field or option that does not exist or a value that it cannot take."""
