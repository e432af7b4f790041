//! TLS of both directions: rustls with ring.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use polymq_core::{Error, Result};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
        version::{TLS12, TLS13},
    },
};

use crate::config::{Http2, HttpConfig, TlsVersion, refuse};

/// What senders check and show.
pub(crate) fn client(config: &HttpConfig) -> Result<ClientConfig> {
    let mut roots = system_roots().clone();
    if let Some(path) = &config.ca_file {
        add(&mut roots, "ca_file", path)?;
    }
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions(config))
        .map_err(|error| unusable("ca_file", &error))?
        .with_root_certificates(roots);
    let mut tls = match (&config.cert_file, &config.key_file) {
        (Some(cert), Some(key)) => builder
            .with_client_auth_cert(certificates("cert_file", cert)?, private_key(key)?)
            .map_err(|error| unusable("cert_file", &error))?,
        _ => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = protocols(config.http2);
    Ok(tls)
}

/// What consumers show and check; `None`: they listen without TLS.
pub(crate) fn server(config: &HttpConfig) -> Result<Option<TlsAcceptor>> {
    let (Some(cert), Some(key)) = (&config.cert_file, &config.key_file) else { return Ok(None) };
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions(config))
        .map_err(|error| unusable("cert_file", &error))?;
    let builder = match &config.client_ca_file {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            add(&mut roots, "client_ca_file", path)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
            builder.with_client_cert_verifier(verifier.build().map_err(|error| unusable("client_ca_file", &error))?)
        }
    };
    let mut tls = builder
        .with_single_cert(certificates("cert_file", cert)?, private_key(key)?)
        .map_err(|error| unusable("cert_file", &error))?;
    tls.alpn_protocols = protocols(Http2::Auto);
    Ok(Some(TlsAcceptor::from(Arc::new(tls))))
}

/// The certificates of the system, read once a process.
fn system_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots
    })
}

fn versions(config: &HttpConfig) -> &'static [&'static SupportedProtocolVersion] {
    static BOTH: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];
    let oldest = usize::from(config.tls_min == TlsVersion::V13);
    &BOTH[oldest..]
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn protocols(http2: Http2) -> Vec<Vec<u8>> {
    let (two, one) = (b"h2".to_vec(), b"http/1.1".to_vec());
    match http2 {
        Http2::Auto => vec![two, one],
        Http2::Only => vec![two],
        Http2::Off => vec![one],
    }
}

fn add(roots: &mut RootCertStore, key: &str, path: &Path) -> Result<()> {
    for certificate in certificates(key, path)? {
        roots.add(certificate).map_err(|error| unusable(key, &error))?;
    }
    Ok(())
}

fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<_> = read.map_err(|error| unusable(key, &error))?;
    if found.is_empty() { Err(refuse(format!("setting {key:?}: the file holds no certificate"))) } else { Ok(found) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| unusable("key_file", &error))
}

fn unusable(key: &str, error: &dyn std::fmt::Display) -> Error {
    refuse(format!("setting {key:?} names a file that cannot be used: {error}"))
}
