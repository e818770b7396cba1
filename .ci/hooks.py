"""Schemathesis hook: what no JSON Schema can express is refused, so it is not sent.

These are emails at reserved domains, and names that are blank when trimmed.
"""

import schemathesis
from email_validator import SPECIAL_USE_DOMAIN_NAMES


@schemathesis.hook
def filter_body(_: schemathesis.HookContext, body: object) -> bool:
    fields = body if isinstance(body, dict) else {}
    email, name = fields.get("email"), fields.get("full_name")
    domain = email.rpartition("@")[2].lower() if isinstance(email, str) else ""
    reserved = any(f".{domain}".endswith(f".{end}") for end in SPECIAL_USE_DOMAIN_NAMES)
    return not (reserved or isinstance(name, str) and not name.strip())
