"""Secrets kept out of what is written: users and passwords in URLs, signatures in queries, MLflow's secret variables.

`redact` cleans any text, and in doubt it removes too much: a password may hold `/`, `:` and `'`. `shown_url` is
for one URL, of which it leaves what says where the file is.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")
_USER_AND_PASSWORD = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<user>[^\s\"/@:]*):[^\s\"]*@", re.IGNORECASE)
_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s\"/@:]+@", re.IGNORECASE)  # a token, with no password
_SECRET_QUERY = re.compile(
    r"(?P<name>[?&;](?:[\w.-]*(?:passw|pwd|token|secret|signature|credential|auth|key)[\w.-]*|sig|pass)=)[^&\s'\"]+",
    re.IGNORECASE,
)
_DIGEST = re.compile(r"sha256=[0-9a-fA-F]{64}")


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` with `***` for users and passwords in URLs, secrets in queries, and what secret variables hold."""
    for name in _SECRET_VARIABLES:
        if environ.get(name):
            text = text.replace(environ[name], "***")
    text = _USER.sub(r"\g<scheme>***@", _USER_AND_PASSWORD.sub(r"\g<scheme>\g<user>:***@", text))
    return _SECRET_QUERY.sub(r"\g<name>***", text)


def redact_all(value: Any) -> Any:
    """Plain values (str, list, dict ...) with every string in them redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_all(each) for key, each in value.items()}
    return [redact_all(each) for each in value] if isinstance(value, list | tuple) else value


def shown_url(url: str) -> str:
    """A URL without user part and query, either of which may be secret; a path and anything else as it is.

    Of what follows `#` only the digest of a file, `sha256=...`, is left.
    """
    if "://" not in url:
        return url
    address, _, fragment = _USER.sub(r"\g<scheme>", _USER_AND_PASSWORD.sub(r"\g<scheme>", url)).partition("#")
    digest = f"#{fragment}" if _DIGEST.fullmatch(fragment) else ""
    return address.partition("?")[0] + digest
