"""Certificates for tests of TLS: trustme's authority, and leaves with SPIFFE names."""

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def serving(authority: trustme.CA) -> ssl.SSLContext:
    """For a server at 127.0.0.1 whose certificate this authority has signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@dataclass(frozen=True)
class Leaf:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes

    def write(self, certificate: Path, key: Path) -> None:
        """Put both in files that a sidecar's user may read."""
        for path, content in ((certificate, self.certificate), (key, self.key)):
            path.write_bytes(content)
            path.chmod(0o644)


class Authority:
    """Signs what a test needs."""

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self._own = x509.load_pem_x509_certificate(self.pem)
        self._key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return self._ca.cert_pem.bytes()

    def issue(self, *names: str) -> Leaf:
        """For DNS names, IP addresses and URIs such as `spiffe://cluster.local/ns/a/sa/b`."""
        plain = [name for name in names if "://" not in name]
        if len(plain) == len(names):
            made = self._ca.issue_cert(*names)
            chain = b"".join(pem.bytes() for pem in made.cert_chain_pems)
            return Leaf(chain, made.private_key_pem.bytes())
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        kinds = [
            x509.UniformResourceIdentifier(name) if "://" in name else x509.DNSName(name)
            for name in names
        ]
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests")]))
            .issuer_name(self._own.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(kinds), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Leaf(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            ),
        )
