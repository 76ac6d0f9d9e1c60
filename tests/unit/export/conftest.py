from export_helpers import base, train  # noqa: F401
