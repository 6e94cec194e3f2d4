"""The choice of a proxy by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY."""

from ipaddress import ip_address, ip_network
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from app.environment.types import is_loopback
from app.environment.variables import CANNOT_START, SettingsError

CLUSTER_SUFFIXES = (".svc", ".cluster.local")


def find_proxy(address: str) -> str | None:
    """Return the proxy for an address, or None for a direct connection.

    This machine and names inside the cluster (without a dot, `.svc`, `.cluster.local`) are called
    directly. The proxy is chosen once, at startup: aiohttp would choose it again for each call, and
    would also send passwords from ~/.netrc.

    Raises:
        SettingsError: the variable does not contain a supported proxy.
    """
    parts = urlsplit(address)
    proxies = getproxies_environment()
    name = parts.scheme if proxies.get(parts.scheme) else "all"
    proxy = proxies.get(name, "")
    if not proxy or _is_direct(parts, proxies):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        found = urlsplit(proxy)
        usable = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError(
            f"{CANNOT_START}: {name.upper()}_PROXY should be a proxy such as "
            "http://proxy.example.org:3128; SOCKS is not supported."
        )
    return proxy


def _is_direct(parts: SplitResult, proxies: dict[str, str]) -> bool:
    host = parts.hostname or ""
    is_name_of_cluster = ("." not in host and ":" not in host) or host.endswith(CLUSTER_SUFFIXES)
    if is_loopback(host) or is_name_of_cluster or _is_in_networks(host, proxies.get("no", "")):
        return True
    return bool(proxy_bypass(parts.netloc))


def _is_in_networks(host: str, no_proxy: str) -> bool:
    """Return whether NO_PROXY contains the network of an address, such as 10.0.0.0/8."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    for entry in no_proxy.split(","):
        try:
            if address in ip_network(entry.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False
