"""Schemathesis hook: reserved domains, which no JSON Schema can express, are refused.

So that these do not count as valid emails, no body with one is sent.
"""

import schemathesis
from email_validator import SPECIAL_USE_DOMAIN_NAMES


@schemathesis.hook
def filter_body(_: schemathesis.HookContext, body: object) -> bool:
    email = body.get("email") if isinstance(body, dict) else None
    domain = email.rpartition("@")[2].lower() if isinstance(email, str) else ""
    return not any(
        f".{domain}".endswith(f".{name}") for name in SPECIAL_USE_DOMAIN_NAMES
    )
