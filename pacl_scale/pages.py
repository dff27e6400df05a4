"""The templates of everything that is written for people to read: reports and model cards."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates(html: bool) -> Environment:
    """The package's templates; a name that is not given is an error, and in HTML every value is escaped."""
    return Environment(
        loader=PackageLoader("pacl_scale"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
