"""Multicast DNS by zeroconf, which has threads of its own; every call here blocks, for up to two seconds.

The library bounds what it keeps of a network: 10,000 records, and packets of 9 KiB.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from node.network.lan.announcement import SERVICE, packed

if TYPE_CHECKING:
    from zeroconf import RecordUpdate, RecordUpdateListener, ServiceBrowser, ServiceInfo, Zeroconf


TXT = 16  # the type of a record (RFC 1035)


class LanError(Exception):
    """A local network in which nothing can be announced or found, with the reason in one line."""


class Multicast(Protocol):
    """The local network, for one node."""

    def open(self, hosts: Sequence[str], heard: Callable[[bytes], None]) -> None:
        """Ask for the service on these interfaces, by their IPv4 addresses.  Raises LanError.

        heard: called with each TXT record of it, in another thread.
        """

    def announce(self, hosts: Sequence[str], port: int, text: bytes) -> None:
        """Answer to the service's name with this TXT record until the end.  Raises LanError."""

    def close(self) -> None:
        """Say goodbye, and end.  Also after `open` has failed, and while another call runs."""


class ZeroconfMulticast:
    """The real one."""

    def __init__(self) -> None:
        self._zeroconf: Zeroconf | None = None
        self._browser: ServiceBrowser | None = None

    def open(self, hosts: Sequence[str], heard: Callable[[bytes], None]) -> None:
        """See `Multicast`."""
        from zeroconf import Error, IPVersion, ServiceBrowser, Zeroconf

        # its warnings, with tracebacks, are of interfaces that went away and of packets that anybody sends
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        try:
            self._zeroconf = Zeroconf(interfaces=list(hosts), ip_version=IPVersion.V4Only, use_asyncio=False)
            self._zeroconf.add_listener(_text_listener(heard), None)
            self._browser = ServiceBrowser(self._zeroconf, SERVICE, handlers=[_ignore])
        except (Error, OSError) as error:
            raise LanError(f"no multicast at {', '.join(hosts)}: {_reason(error)}") from None

    def announce(self, hosts: Sequence[str], port: int, text: bytes) -> None:
        """See `Multicast`."""
        from zeroconf import Error

        info = service_info(secrets.token_hex(16), hosts, port, text)
        try:
            if self._zeroconf is not None:
                self._zeroconf.register_service(info)
        except (Error, OSError, TimeoutError) as error:
            raise LanError(f"this node is not announced: {_reason(error)}") from None

    def close(self) -> None:
        """See `Multicast`."""
        from zeroconf import Error

        if self._browser is not None:
            self._browser.cancel()  # its own thread, which outlives `close`
        if self._zeroconf is not None:
            with contextlib.suppress(Error, OSError, TimeoutError):
                self._zeroconf.close()  # with a goodbye


def service_info(name: str, hosts: Sequence[str], port: int, text: bytes) -> ServiceInfo:
    """A service of libp2p's kind.  name: by chance, so that it says nothing of the machine."""
    from zeroconf import ServiceInfo

    return ServiceInfo(
        SERVICE, f"{name}.{SERVICE}", port=port, properties=text, server=f"{name}.local.",
        addresses=packed(hosts),
    )  # fmt: skip


def _ignore(**_change: object) -> None:
    """The browser asks for the service's names; what they have to say comes to the listener."""


def _text_listener(heard: Callable[[bytes], None]) -> RecordUpdateListener:
    """A listener for TXT records of the service.

    The browser's own way, a question for each name, would wait for names without an answer.
    """
    from zeroconf import RecordUpdateListener

    class Listener(RecordUpdateListener):
        def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
            for record in (update.new for update in records):
                text = getattr(record, "text", None)  # of TXT records alone
                is_ours = record.type == TXT and record.name.lower().endswith(f".{SERVICE}")
                if is_ours and isinstance(text, bytes) and record.ttl > 0:  # 0: it says goodbye
                    heard(text)

    return Listener()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
