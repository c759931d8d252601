"""Decides which addresses of pictures the server may ask: by the URL's form, by its domain, and by where it leads."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kimi_jax.printable import printable

PORTS = {"http": 80, "https": 443}
MAX_URL = 8_192  # characters; signed URLs of stores have up to 2,000

_DATA = "send the picture as a data: URL (data:image/png;base64,...)"
# Narrower than RFC 3986, so that no two readers of a URL find different hosts in it: no user, no backslash, no address
# in brackets, no control, nothing beyond ASCII.
_URL = re.compile(r"(https?)://([a-z0-9._-]{1,253})(?::([0-9]{1,5}))?([/?][!-\[\]-~]*)?", re.ASCII | re.IGNORECASE)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# A name with two labels or more, the last of which is no number: `1.2.3.4` and `0x7f.1` are addresses.
_DOMAIN = re.compile(rf"(?:\*\.)?(?:{_LABEL}\.)+(?![0-9]){_LABEL}", re.ASCII)
# IPv6 networks that lead to IPv4 addresses (Teredo, 6to4) or are for documents, within the global 2000::/3.
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_NOT_IPV6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_NOT_IPV4 = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")))  # protocols' own, relays of 6to4


@dataclass(frozen=True)
class Target:
    """Holds the parts of a URL that may be asked. `path` has the query too."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL without its fragment."""
        return f"{self.scheme}://{self.authority}{self.path}"


def media_domain(text: str) -> str:
    """Returns the name of a domain, or `*.` and a name for its subdomains, in the form that `read_url` compares.

    Raises ValueError for anything else, addresses and names beyond ASCII included.
    """
    name = text.lower().removesuffix(".")
    if len(name) > 253 or not _DOMAIN.fullmatch(name):
        raise ValueError(
            f"{printable(repr(text), 100)} is no domain; expected a name like images.example.org, or *.example.org "
            "for its subdomains, in ASCII (xn--... for other letters)"
        )
    return name


def read_url(url: str, domains: Sequence[str]) -> Target:
    """Returns the parts of a picture's URL.

    domains: from `media_domain`. Raises ValueError, which does not repeat the URL, where it is no http(s) URL of the
    form that is taken, its domain is none of `domains`, or its port is neither 80 nor 443.
    """
    found = _URL.fullmatch(url.partition("#")[0]) if len(url) <= MAX_URL else None
    if found is None:
        raise ValueError(
            f"expected https://NAME/PATH in ASCII, of at most {MAX_URL:,} characters and without a user; or {_DATA}"
        )
    scheme, host = found[1].lower(), found[2].lower().removesuffix(".")
    if not any(_names(domain, host) for domain in domains):
        raise ValueError(
            f"{scheme}:// is not fetched from this host, which no --allow-media-domain of the server names; {_DATA}"
        )
    port = PORTS[scheme] if found[3] is None else int(found[3])
    if port not in PORTS.values():
        raise ValueError(f"pictures are fetched from the ports 80 and 443 alone; {_DATA}")
    path = found[4] or "/"
    return Target(scheme, host, port, path if path.startswith("/") else f"/{path}")


def is_public(address: str) -> bool:
    """Says whether an IP address is one of a single host in the public Internet.

    IPv6 addresses that stand for an IPv4 address (::ffff:127.0.0.1, 64:ff9b::, 6to4, Teredo) are not, whichever it is.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not found.is_global or found.is_multicast:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return not found.is_reserved and not any(found in network for network in _NOT_IPV4)
    return found.scope_id is None and found in _GLOBAL_IPV6 and not any(found in network for network in _NOT_IPV6)


def _names(domain: str, host: str) -> bool:
    """Says whether an entry of the list names a host."""
    return host.endswith(domain[1:]) and len(host) >= len(domain) if domain.startswith("*.") else host == domain
