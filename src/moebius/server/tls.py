"""TLS: a certificate that is checked before the port opens, and can be read again while it is in
use."""

import ssl
from pathlib import Path

from moebius.errors import ConfigError


class Certificate:
    """The server's certificate chain and its private key, in PEM files."""

    def __init__(self, certificate: Path, key: Path | None) -> None:
        """key: where the private key is; None: in the certificate's file. Raises ConfigError."""
        self._certificate = certificate
        self._key = key
        self.context = self._read()
        """What connections are made with."""

    def reload(self) -> None:
        """Read both files again, for connections from now on. ConfigError where they are wrong:
        then all stays as it was."""
        self._read()  # a pair that does not fit would leave half of it in the context
        self._load(self.context)

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        def no_password() -> str:
            raise ConfigError(f"TLS key {self._key or self._certificate} has a password")

        try:
            context.load_cert_chain(self._certificate, self._key, password=no_password)
        except ssl.SSLError as error:
            raise ConfigError(
                f"TLS certificate {self._certificate} with key {self._key or 'in the same file'}: "
                f"{error.reason or 'no PEM of a certificate and its key'}"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"TLS certificate {self._certificate} or its key {self._key}: {error.strerror}"
            ) from error
