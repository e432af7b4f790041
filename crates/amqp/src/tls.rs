//! TLS with rustls.
//!
//! The client library has TLS of its own, which brings 72 crates (PKCS #12 among them) where these few do.

use std::{fmt, io, path::Path, sync::Arc};

use polymq_core::{Error, ErrorKind, Result};
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
        version::{TLS12, TLS13},
    },
};

use crate::{
    NAME,
    config::{AmqpConfig, TlsVersion},
};

/// What is needed to trust a broker, and to be trusted by it.
#[derive(Clone)]
pub(crate) struct Tls(TlsConnector);

impl Tls {
    /// Reads certificates and keys; blocks on files.
    pub(crate) fn load(config: &AmqpConfig) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        // A system without certificates, or with a broken one, is no reason to refuse the given authority.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = &config.ca_file {
            for certificate in certificates("ca_file", path)? {
                roots.add(certificate).map_err(|error| unusable("ca_file", path, error))?;
            }
        }
        let versions = match config.tls_min {
            TlsVersion::V12 => vec![&TLS12, &TLS13],
            TlsVersion::V13 => vec![&TLS13],
        };
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&versions)
            .map_err(|error| Error::new(ErrorKind::Config, format!("TLS: {error}")).with_backend(NAME))?
            .with_root_certificates(roots);
        let config = match (&config.cert_file, &config.key_file) {
            (Some(cert), Some(key)) => {
                let chain = certificates("cert_file", cert)?;
                let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable("key_file", key, error))?;
                let given = builder.with_client_auth_cert(chain, secret);
                given.map_err(|error| unusable("key_file", key, error))?
            }
            _ => builder.with_no_client_auth(),
        };
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    pub(crate) async fn handshake(&self, host: &str, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        self.0.connect(name, stream).await
    }
}

fn certificates(setting: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if certificates.is_empty() => Err(unusable(setting, path, "it holds no certificate")),
        read => read.map_err(|error| unusable(setting, path, error)),
    }
}

#[cold]
fn unusable(setting: &str, path: &Path, reason: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Config, format!("setting {setting:?}: {path:?} is not usable: {reason}"))
        .with_backend(NAME)
        .with_hint("give the path of a PEM file that this process may read")
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}
